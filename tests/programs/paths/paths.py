# paths.py NAME FILE N: see paths.c.
import ctypes, mmap, multiprocessing, os, shutil, signal, subprocess, sys, time

name, path, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
signal.alarm(120)
parent = os.getppid()
with open(path, "wb") as f:
    f.write(b"\0" * 16384)
fd = os.open(path, os.O_RDWR)
libc = ctypes.CDLL("libc.so.6")
mapped = mmap.mmap(fd, 16384) if name == "mmap" else None
queue = done = worker = None


def work(queue, done):
    while (i := queue.get()) is not None:
        os.pwrite(fd, record(i), place(i))
        done.put(i)


def record(i):
    return b"%-30s %032d\n" % (name.encode(), i)


def place(i):
    return i % 256 * 64


def once(i):
    if name == "open":
        with open(path, "r+b") as f:
            f.seek(place(i))
            f.write(record(i))
    elif name == "os.write":
        os.lseek(fd, place(i), 0)
        os.write(fd, record(i))
    elif name == "mmap":
        mapped[place(i):place(i) + 64] = record(i)
    elif name == "ctypes":
        libc.pwrite(fd, record(i), ctypes.c_size_t(64), ctypes.c_long(place(i)))
    elif name == "ctypes-stdio":
        libc.fopen.restype = ctypes.c_void_p
        f = ctypes.c_void_p(libc.fopen(path.encode(), b"r+"))
        libc.fputs(record(i), f)
        libc.fclose(f)
    elif name == "multiprocessing":
        queue.put(i)
        done.get()
    elif name == "shutil":
        with open(path + ".new", "wb") as f:
            f.write(record(i))
        shutil.copyfile(path + ".new", path)
        shutil.move(path + ".new", path + ".moved")
    elif name == "print":
        print(i, "record", file=out, flush=True)
        if i % 256 == 0:
            out.seek(0)
    elif name == "subprocess":
        subprocess.run(["/bin/sh", "-c", "echo %d > '%s'" % (i, path)], check=True)
    else:
        sys.exit(2)


if name == "print":
    out = open(path, "r+")
if name == "multiprocessing":
    queue, done = multiprocessing.SimpleQueue(), multiprocessing.SimpleQueue()
    worker = multiprocessing.Process(target=work, args=(queue, done), daemon=True)
    worker.start()
i = 1
while count == 0 or i <= count:
    once(i)
    i += 1
    if count == 0:
        time.sleep(0.0003)
        if os.getppid() != parent:
            break
if worker:
    queue.put(None)
    worker.join()
print(name, i - 1, "records", file=sys.stderr)
