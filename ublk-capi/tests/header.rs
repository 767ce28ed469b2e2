//! `include/ublk_rs.h` is what the sources say. `UBLK_RS_BLESS=1 cargo test -p ublk-capi --test header` writes it anew.

use std::path::Path;

const AT: &str = env!("CARGO_MANIFEST_DIR");

fn version() -> String {
    let part = |name: &str, value: &str| format!("#define UBLK_RS_VERSION_{name} {value}\n");
    let (major, minor, patch) = (
        env!("CARGO_PKG_VERSION_MAJOR"),
        env!("CARGO_PKG_VERSION_MINOR"),
        env!("CARGO_PKG_VERSION_PATCH"),
    );
    [
        "/** The version of this header: MAJOR << 16 | MINOR << 8 | PATCH. */\n",
        "#define UBLK_RS_VERSION \\\n    ((UBLK_RS_VERSION_MAJOR << 16) | (UBLK_RS_VERSION_MINOR << 8) | UBLK_RS_VERSION_PATCH)\n",
        &part("MAJOR", major),
        &part("MINOR", minor),
        &part("PATCH", patch),
    ]
    .concat()
}

fn generated() -> String {
    let config = cbindgen::Config::from_file(Path::new(AT).join("cbindgen.toml"))
        .unwrap_or_else(|e| panic!("cbindgen.toml: {e}"));
    let mut builder = cbindgen::Builder::new().with_config(config);
    // The order of the header's parts.
    for part in [
        "version",
        "error",
        "log",
        "features",
        "backend",
        "device",
        "options",
        "targets",
        "workers",
        "lifecycle",
        "request",
        "stats",
        "control",
    ] {
        builder = builder.with_src(Path::new(AT).join(format!("src/{part}.rs")));
    }
    let mut bytes = Vec::new();
    builder.generate().unwrap_or_else(|e| panic!("cbindgen: {e}")).write(&mut bytes);
    let text = String::from_utf8(bytes).unwrap_or_else(|e| panic!("{e}"));
    text.replace("@VERSION@\n", &version())
}

#[test]
fn the_header_is_what_the_sources_say() {
    let path = Path::new(AT).join("../include/ublk_rs.h");
    let wanted = generated();
    if std::env::var_os("UBLK_RS_BLESS").is_some() {
        std::fs::write(&path, &wanted).unwrap_or_else(|e| panic!("{e}"));
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        there == wanted,
        "include/ublk_rs.h is not what the sources say: UBLK_RS_BLESS=1 cargo test -p ublk-capi --test header"
    );
}

#[test]
fn the_version_is_the_packages() {
    let mut parts = env!("CARGO_PKG_VERSION").split('.').map(|part| part.parse::<u32>().unwrap());
    let mut next = || parts.next().unwrap();
    let number = next() << 16 | next() << 8 | next();
    assert_eq!(ublk_rs::ublk_rs_version(), number);
}
