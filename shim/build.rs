//! Passes the link arguments of the shim on. They stand in a file of their own
//! because the coordinator's build script, which builds the copy that it
//! embeds, must use the same.

fn main() {
    println!("cargo:rerun-if-changed=link-args.txt");
    for arg in include_str!("link-args.txt").lines() {
        println!("cargo:rustc-cdylib-link-arg={arg}");
    }
}
