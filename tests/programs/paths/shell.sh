#!/bin/bash
# shell.sh NAME FILE N: see paths.c.
name=$1 file=$2 count=$3
parent=$PPID
printf 'start %05d\n' {1..40} >"$file"
i=1
while ((count == 0 || i <= count)); do
    case $name in
    echo) echo "record $i" >>"$file"; ((i % 500)) || : >"$file" ;;
    printf) printf 'record %d\n' "$i" >"$file" ;;
    dd) dd if=/dev/zero of="$file" bs=64 count=1 seek=$((i % 100)) conv=notrunc status=none ;;
    cp) echo "$i" >"$file.new"; cp "$file.new" "$file" ;;
    mv) echo "$i" >"$file.new"; mv "$file.new" "$file" ;;
    tee) echo "$i" | tee "$file" >/dev/null ;;
    sed) sed -i "1s/.*/record $i/" "$file" ;;
    awk) awk -v i="$i" -v f="$file" 'BEGIN { for (k = 0; k < 9; k++) print i, k > f }' ;;
    sort) echo "$i" >>"$file"; sort -R -o "$file" --random-source=/dev/zero "$file"
        ((i % 100)) || : >"$file" ;;
    tar) echo "$i" >"$file.in"; tar -C "${file%/*}" --mtime=@0 -cf "$file" "${file##*/}.in" ;;
    gzip) echo "$i" >"$file.g"; gzip -nf "$file.g"; mv "$file.g.gz" "$file" ;;
    install) echo "$i" >"$file.in"; install -m 640 "$file.in" "$file" ;;
    truncate) truncate -s $((i % 1000)) "$file" ;;
    touch) touch -d "@$i" "$file" ;;
    ln) ln -f "$file" "$file.link"; ln -sf "$i" "$file.symlink" ;;
    rsync) echo "$i" >"$file.in"; rsync --no-times --checksum --inplace "$file.in" "$file" ;;
    sqlite3) ((i > 1)) || rm "$file"; sqlite3 "$file" "create table if not exists t(i); insert into t values($i);" ;;
    *) exit 2 ;;
    esac || exit 4
    ((i++))
    if ((count == 0)); then
        # Whoever started us was killed, or time is over.
        read -r _ _ _ now _ </proc/$$/stat
        ((now == parent && SECONDS < 120)) || break
    fi
done
echo "$name: $((i - 1)) records" >&2
