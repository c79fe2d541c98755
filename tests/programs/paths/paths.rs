// paths-rs NAME FILE N: see paths.c.
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, name, path, count] = &args[..] else {
        std::process::exit(2);
    };
    let count: u64 = count.parse().unwrap();
    let (begin, parent) = (Instant::now(), std::os::unix::process::parent_id());
    fs::write(path, [0; 16384]).unwrap();
    let mut file: File = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut i = 1;
    while count == 0 || i <= count {
        let record = format!("{name:30} {i:032}\n");
        let at = i % 256 * 64;
        match name.as_str() {
            "write" => {
                file.seek(SeekFrom::Start(at)).unwrap();
                file.write_all(record.as_bytes()).unwrap();
            }
            "write_at" => file.write_all_at(record.as_bytes(), at).unwrap(),
            "copy" => {
                fs::write(format!("{path}.new"), &record).unwrap();
                fs::copy(format!("{path}.new"), path).unwrap();
                file.set_len(64 + i % 64).unwrap();
                fs::rename(format!("{path}.new"), format!("{path}.old")).unwrap();
            }
            _ => std::process::exit(2),
        }
        i += 1;
        if count == 0 {
            std::thread::sleep(Duration::from_micros(300));
            let is_orphan = std::os::unix::process::parent_id() != parent;
            if is_orphan || begin.elapsed() > Duration::from_secs(120) {
                break;
            }
        }
    }
    eprintln!("{name}: {} records", i - 1);
}
