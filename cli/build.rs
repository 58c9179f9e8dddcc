//! Where the program finds CTranslate2's library when it starts: where it was found now, or in `lib/` beside the program's folder.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBRARY_PATH");
    if env::var_os("CARGO_FEATURE_CT2").is_none() {
        return;
    }
    let folders = env::var_os("LIBRARY_PATH").unwrap_or_default();
    let here = env::split_paths(&folders).find(|folder| folder.join("libctranslate2.so").is_file());
    for folder in here.into_iter().chain([PathBuf::from("$ORIGIN/../lib")]) {
        println!("cargo:rustc-link-arg-bins=-Wl,-rpath,{}", folder.display());
    }
}
