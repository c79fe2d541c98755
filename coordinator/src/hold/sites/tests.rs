use super::*;
use std::fs;
#[test]
fn survey() {
    let mut args: Vec<String> = std::env::var("SURVEY")
        .map(|s| s.split(' ').map(str::to_owned).collect())
        .unwrap_or_default();
    if args.is_empty() {
        args = vec!["/lib/x86_64-linux-gnu/libc.so.6".into()];
    }
    for path in args {
        let Ok(bytes) = fs::read(&path) else { continue };
        let t = std::time::Instant::now();
        match compute(&bytes) {
            Ok(s) => {
                let unknown = s.records.iter().filter(|r| r.number < 0).count();
                let easy = s.records.iter().filter(|r| r.shape == 0).count();
                let after = s.records.iter().filter(|r| r.after > 0).count();
                if s.calls > 0 || !s.missed.is_empty() {
                    println!(
                        "{path}: flags {} calls {} records {} easy {easy} unknown {unknown} after {after} missed {} {:x?} in {:?}",
                        s.flags,
                        s.calls,
                        s.records.len(),
                        s.missed.len(),
                        &s.missed[..s.missed.len().min(6)],
                        t.elapsed()
                    );
                } else if t.elapsed().as_millis() > 100 {
                    println!("{path}: none, {:?}", t.elapsed())
                }
                if std::env::var_os("DUMP").is_some() {
                    for r in &s.records {
                        println!(
                            "{:#x}\t{}\t{}\t{}\t{}",
                            r.address + u64::from(r.before),
                            r.number,
                            r.shape,
                            r.before,
                            r.after
                        );
                    }
                }
            }
            Err(e) => println!("{path}: {e}"),
        }
    }
}
