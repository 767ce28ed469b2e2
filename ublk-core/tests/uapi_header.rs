//! Our structs and constants against the kernel's own header: a C program made from it prints what
//! it means, and every name in the header has to be known here.
//!
//! `UBLK_UAPI_INCLUDE` is the directory of the 7.3 headers, `usr/include` of Debian's
//! `linux-libc-dev`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

use ublk_core::uapi::*;

/// What stands for a name that is not in the header: a field that C has as the compiler's gap or
/// under another name.
const OURS_ALONE: &[(&str, &str)] = &[("ublk_params", "hole")];
const RENAMED: &[(&str, &str, &str)] = &[("blk_zone", "type_", "type")];

/// Macros that are functions, guards or helpers in C and have nothing to compare.
const NOT_CONSTANTS: &[&str] = &["USER_BLK_DRV_CMD_INC_H"];

macro_rules! constants {
    ($($name:ident)*) => {
        // Through i128, so that signed and unsigned ones of every width compare by value.
        const CONSTANTS: &[(&str, i128)] = &[$((stringify!($name), $name as i128)),*];
    };
}

constants! {
    UBLK_CMD_GET_QUEUE_AFFINITY UBLK_CMD_GET_DEV_INFO UBLK_CMD_ADD_DEV UBLK_CMD_DEL_DEV UBLK_CMD_START_DEV
    UBLK_CMD_STOP_DEV UBLK_CMD_SET_PARAMS UBLK_CMD_GET_PARAMS UBLK_CMD_START_USER_RECOVERY
    UBLK_CMD_END_USER_RECOVERY UBLK_CMD_GET_DEV_INFO2
    UBLK_U_CMD_GET_QUEUE_AFFINITY UBLK_U_CMD_GET_DEV_INFO UBLK_U_CMD_ADD_DEV UBLK_U_CMD_DEL_DEV
    UBLK_U_CMD_START_DEV UBLK_U_CMD_STOP_DEV UBLK_U_CMD_SET_PARAMS UBLK_U_CMD_GET_PARAMS
    UBLK_U_CMD_START_USER_RECOVERY UBLK_U_CMD_END_USER_RECOVERY UBLK_U_CMD_GET_DEV_INFO2
    UBLK_U_CMD_GET_FEATURES UBLK_U_CMD_DEL_DEV_ASYNC UBLK_U_CMD_UPDATE_SIZE UBLK_U_CMD_QUIESCE_DEV
    UBLK_U_CMD_TRY_STOP_DEV UBLK_U_CMD_REG_BUF UBLK_U_CMD_UNREG_BUF
    UBLK_SHMEM_BUF_READ_ONLY UBLK_FEATURES_LEN
    UBLK_IO_FETCH_REQ UBLK_IO_COMMIT_AND_FETCH_REQ UBLK_IO_NEED_GET_DATA
    UBLK_U_IO_FETCH_REQ UBLK_U_IO_COMMIT_AND_FETCH_REQ UBLK_U_IO_NEED_GET_DATA UBLK_U_IO_REGISTER_IO_BUF
    UBLK_U_IO_UNREGISTER_IO_BUF UBLK_U_IO_PREP_IO_CMDS UBLK_U_IO_COMMIT_IO_CMDS UBLK_U_IO_FETCH_IO_CMDS
    UBLK_IO_RES_OK UBLK_IO_RES_NEED_GET_DATA UBLK_IO_RES_ABORT
    UBLKSRV_CMD_BUF_OFFSET UBLKSRV_IO_BUF_OFFSET UBLK_MAX_QUEUE_DEPTH
    UBLK_IO_BUF_OFF UBLK_IO_BUF_BITS UBLK_IO_BUF_BITS_MASK UBLK_TAG_OFF UBLK_TAG_BITS UBLK_TAG_BITS_MASK
    UBLK_QID_OFF UBLK_QID_BITS UBLK_QID_BITS_MASK UBLK_MAX_NR_QUEUES
    UBLKSRV_IO_BUF_TOTAL_BITS UBLKSRV_IO_BUF_TOTAL_SIZE UBLK_INTEGRITY_FLAG_OFF UBLKSRV_IO_INTEGRITY_FLAG
    UBLK_F_SUPPORT_ZERO_COPY UBLK_F_URING_CMD_COMP_IN_TASK UBLK_F_NEED_GET_DATA UBLK_F_USER_RECOVERY
    UBLK_F_USER_RECOVERY_REISSUE UBLK_F_UNPRIVILEGED_DEV UBLK_F_CMD_IOCTL_ENCODE UBLK_F_USER_COPY
    UBLK_F_ZONED UBLK_F_USER_RECOVERY_FAIL_IO UBLK_F_UPDATE_SIZE UBLK_F_AUTO_BUF_REG UBLK_F_QUIESCE
    UBLK_F_PER_IO_DAEMON UBLK_F_BUF_REG_OFF_DAEMON UBLK_F_BATCH_IO UBLK_F_INTEGRITY UBLK_F_SAFE_STOP_DEV
    UBLK_F_NO_AUTO_PART_SCAN UBLK_F_SHMEM_ZC UBLK_F_IO_DESC_SIZE
    UBLK_S_DEV_DEAD UBLK_S_DEV_LIVE UBLK_S_DEV_QUIESCED UBLK_S_DEV_FAIL_IO
    UBLK_IO_OP_READ UBLK_IO_OP_WRITE UBLK_IO_OP_FLUSH UBLK_IO_OP_DISCARD UBLK_IO_OP_WRITE_SAME
    UBLK_IO_OP_WRITE_ZEROES UBLK_IO_OP_ZONE_OPEN UBLK_IO_OP_ZONE_CLOSE UBLK_IO_OP_ZONE_FINISH
    UBLK_IO_OP_ZONE_APPEND UBLK_IO_OP_ZONE_RESET_ALL UBLK_IO_OP_ZONE_RESET UBLK_IO_OP_REPORT_ZONES
    UBLK_IO_F_FAILFAST_DEV UBLK_IO_F_FAILFAST_TRANSPORT UBLK_IO_F_FAILFAST_DRIVER UBLK_IO_F_META
    UBLK_IO_F_FUA UBLK_IO_F_NOUNMAP UBLK_IO_F_SWAP UBLK_IO_F_NEED_REG_BUF UBLK_IO_F_INTEGRITY
    UBLK_IO_F_SHMEM_ZC UBLK_AUTO_BUF_REG_FALLBACK UBLK_AUTO_BUF_REG_F_MASK
    UBLK_BATCH_F_HAS_ZONE_LBA UBLK_BATCH_F_HAS_BUF_ADDR UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK
    UBLK_ATTR_READ_ONLY UBLK_ATTR_ROTATIONAL UBLK_ATTR_VOLATILE_CACHE UBLK_ATTR_FUA UBLK_MIN_SEGMENT_SIZE
    UBLK_PARAM_TYPE_BASIC UBLK_PARAM_TYPE_DISCARD UBLK_PARAM_TYPE_DEVT UBLK_PARAM_TYPE_ZONED
    UBLK_PARAM_TYPE_DMA_ALIGN UBLK_PARAM_TYPE_SEGMENT UBLK_PARAM_TYPE_INTEGRITY
    UBLK_SHMEM_ZC_OFF_MASK UBLK_SHMEM_ZC_IDX_OFF UBLK_SHMEM_ZC_IDX_MASK
    // linux/fs.h
    LBMD_PI_CAP_INTEGRITY LBMD_PI_CAP_REFTAG LBMD_PI_CSUM_NONE LBMD_PI_CSUM_IP LBMD_PI_CSUM_CRC16_T10DIF
    LBMD_PI_CSUM_CRC64_NVME
    // linux/blkzoned.h
    BLK_ZONE_TYPE_CONVENTIONAL BLK_ZONE_TYPE_SEQWRITE_REQ BLK_ZONE_TYPE_SEQWRITE_PREF BLK_ZONE_COND_NOT_WP
    BLK_ZONE_COND_EMPTY BLK_ZONE_COND_IMP_OPEN BLK_ZONE_COND_EXP_OPEN BLK_ZONE_COND_CLOSED
    BLK_ZONE_COND_READONLY BLK_ZONE_COND_FULL BLK_ZONE_COND_OFFLINE BLK_ZONE_COND_ACTIVE
    // linux/io_uring.h
    IORING_URING_CMD_FIXED IORING_URING_CMD_MULTISHOT IORING_OP_URING_CMD IORING_OP_URING_CMD128
    IORING_SETUP_SQE_MIXED IORING_SETUP_CQE_MIXED
}

struct Layout {
    name: &'static str,
    size: usize,
    fields: &'static [(&'static str, usize, usize)],
}

const fn size_of_field<S, T>(_: fn(&S) -> &T) -> usize {
    size_of::<T>()
}

macro_rules! layouts {
    ($($name:ident { $($field:ident)* })*) => {
        const LAYOUTS: &[Layout] = &[$(Layout {
            name: stringify!($name),
            size: size_of::<$name>(),
            fields: &[$((
                stringify!($field),
                std::mem::offset_of!($name, $field),
                size_of_field(|s: &$name| &s.$field),
            )),*],
        }),*];
        // A field that is missing above does not compile here.
        const _: fn() = || {
            $(let _ = |$name { $($field: _),* }: $name| {};)*
        };
    };
}

layouts! {
    ublk_shmem_buf_reg { addr len flags reserved }
    ublksrv_ctrl_cmd { dev_id queue_id len addr data dev_path_len pad reserved }
    ublksrv_ctrl_dev_info {
        nr_hw_queues queue_depth state io_desc_size max_io_buf_bytes dev_id ublksrv_pid pad1 flags ublksrv_flags
        owner_uid owner_gid reserved1 reserved2
    }
    ublksrv_io_desc { op_flags nr_sectors start_sector addr }
    ublk_auto_buf_reg { index flags reserved0 reserved1 }
    ublksrv_io_cmd { q_id tag result addr }
    ublk_elem_header { tag buf_index result }
    ublk_batch_io { q_id flags nr_elem elem_bytes reserved reserved2 }
    ublk_param_basic {
        attrs logical_bs_shift physical_bs_shift io_opt_shift io_min_shift max_sectors chunk_sectors dev_sectors
        virt_boundary_mask
    }
    ublk_param_discard {
        discard_alignment discard_granularity max_discard_sectors max_write_zeroes_sectors max_discard_segments reserved0
    }
    ublk_param_devt { char_major char_minor disk_major disk_minor }
    ublk_param_zoned { max_open_zones max_active_zones max_zone_append_sectors reserved }
    ublk_param_dma_align { alignment pad }
    ublk_param_segment { seg_boundary_mask max_segment_size max_segments pad }
    ublk_param_integrity {
        flags max_integrity_segments interval_exp metadata_size pi_offset csum_type tag_size pad
    }
    ublk_params { len types basic discard devt zoned dma hole seg integrity }
    blk_zone { start len wp type_ cond non_seq reset resv capacity reserved }
}

fn include_dir() -> PathBuf {
    let dir = env::var_os("UBLK_UAPI_INCLUDE").unwrap_or_else(|| {
        panic!(
            "UBLK_UAPI_INCLUDE is not set: it names the include directory of linux-libc-dev 7.3 (make test sets it)"
        )
    });
    let dir = PathBuf::from(dir);
    assert!(dir.join("linux/ublk_cmd.h").exists(), "no linux/ublk_cmd.h in {}", dir.display());
    dir
}

/// Comments blanked out, continued lines joined.
fn header(dir: &std::path::Path) -> String {
    let text = fs::read_to_string(dir.join("linux/ublk_cmd.h")).unwrap().replace("\\\n", " ");
    let mut code = String::new();
    let mut rest = text.as_str();
    while let Some(begin) = rest.find("/*") {
        code += &rest[..begin];
        rest = &rest[begin..];
        rest = &rest[rest.find("*/").expect("comments end") + 2..];
    }
    code + rest
}

fn c_field(name: &'static str, field: &'static str) -> Option<&'static str> {
    if OURS_ALONE.contains(&(name, field)) {
        return None;
    }
    let renamed = RENAMED.iter().find(|(s, ours, _)| (*s, *ours) == (name, field));
    Some(renamed.map_or(field, |(_, _, theirs)| theirs))
}

fn probe(dir: &std::path::Path) -> String {
    let mut c = String::from("#include <stddef.h>\n#include <stdio.h>\n#include <errno.h>\n");
    // The four headers by their paths; what they include in turn is the machine's where it has it
    // (linux/types.h).
    for header in ["fs.h", "blkzoned.h", "io_uring.h", "ublk_cmd.h"] {
        writeln!(c, "#include \"{}\"", dir.join("linux").join(header).display()).unwrap();
    }
    c += "int main(void) {\n";
    for (name, _) in CONSTANTS {
        // A negative constant is an int; the others fit an unsigned long long.
        writeln!(
            c,
            "  if ((long long)({name}) < 0 && ({name}) < 0) printf(\"{name} %lld\\n\", (long long)({name}));\n  \
             else printf(\"{name} %llu\\n\", (unsigned long long)({name}));"
        )
        .unwrap();
    }
    for layout in LAYOUTS {
        let name = layout.name;
        writeln!(c, "  printf(\"{name} %zu\\n\", sizeof(struct {name}));").unwrap();
        for (field, ..) in layout.fields {
            if let Some(theirs) = c_field(name, field) {
                writeln!(
                    c,
                    "  printf(\"{name}.{field} %zu\\n\", offsetof(struct {name}, {theirs}));\n  \
                     printf(\"{name}.{field}# %zu\\n\", sizeof(((struct {name} *)0)->{theirs}));"
                )
                .unwrap();
            }
        }
    }
    // Unions have a second name, and functions a meaning.
    c += "  printf(\"nr_zones %zu\\n\", offsetof(struct ublksrv_io_desc, nr_zones));\n\
          printf(\"zone_append_lba %zu\\n\", offsetof(struct ublksrv_io_cmd, zone_append_lba));\n\
          struct ublk_auto_buf_reg r = { 0x1234, 0x56, 0x78, 0x9abcdef0 };\n\
          printf(\"auto_buf_reg %llu\\n\", (unsigned long long)ublk_auto_buf_reg_to_sqe_addr(&r));\n\
          printf(\"shmem_zc %llu\\n\", (unsigned long long)ublk_shmem_zc_addr(0xabcd, 0x12345678));\n\
          return 0;\n}\n";
    c
}

fn run_probe(dir: &std::path::Path) -> BTreeMap<String, i128> {
    let build = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (source, program) = (build.join("uapi_probe.c"), build.join("uapi_probe"));
    fs::write(&source, probe(dir)).unwrap();
    let cc = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let compiled = Command::new(&cc)
        .args(["-w", "-idirafter"])
        .arg(dir)
        .arg("-o")
        .args([&program, &source])
        .output()
        .unwrap_or_else(|e| panic!("cannot run the C compiler {cc:?}: {e}"));
    assert!(
        compiled.status.success(),
        "the probe does not compile: a name of ours is not in the header?\n{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let printed = Command::new(&program).output().unwrap().stdout;
    let printed = String::from_utf8(printed).unwrap();
    printed
        .lines()
        .map(|line| {
            let (name, value) = line.split_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

#[test]
fn every_constant_size_and_offset_is_the_kernels() {
    let kernel = run_probe(&include_dir());
    let mut compared = 0;
    let mut compare = |name: &str, ours: i128| {
        assert_eq!(kernel.get(name), Some(&ours), "{name}");
        compared += 1;
    };
    for (name, value) in CONSTANTS {
        compare(name, *value);
    }
    for layout in LAYOUTS {
        compare(layout.name, layout.size as i128);
        for (field, offset, size) in layout.fields {
            if c_field(layout.name, field).is_some() {
                compare(&format!("{}.{field}", layout.name), *offset as i128);
                compare(&format!("{}.{field}#", layout.name), *size as i128);
            }
        }
    }
    compare("nr_zones", std::mem::offset_of!(ublksrv_io_desc, nr_sectors) as i128);
    compare("zone_append_lba", std::mem::offset_of!(ublksrv_io_cmd, addr) as i128);
    let reg =
        ublk_auto_buf_reg { index: 0x1234, flags: 0x56, reserved0: 0x78, reserved1: 0x9abc_def0 };
    let addr = ublk_auto_buf_reg_to_sqe_addr(&reg);
    compare("auto_buf_reg", addr.into());
    assert_eq!(ublk_sqe_addr_to_auto_buf_reg(addr), reg);
    let addr = ublk_shmem_zc_addr(0xabcd, 0x1234_5678);
    compare("shmem_zc", addr.into());
    assert_eq!((ublk_shmem_zc_index(addr), ublk_shmem_zc_offset(addr)), (0xabcd, 0x1234_5678));
    assert_eq!(compared, kernel.len(), "the probe printed more than was compared");
    println!("{compared} values compared");
}

#[test]
fn every_name_in_the_header_is_known() {
    let header = header(&include_dir());
    let known: BTreeSet<_> = CONSTANTS.iter().map(|(name, _)| *name).collect();
    let layouts: BTreeSet<_> = LAYOUTS.iter().map(|layout| layout.name).collect();
    let mut defined = 0;
    for line in header.lines() {
        let Some(rest) = line.trim_start().strip_prefix("#define") else {
            continue;
        };
        let name: String =
            rest.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if !NOT_CONSTANTS.contains(&name.as_str()) {
            assert!(known.contains(name.as_str()), "{name} is in the header and not in uapi");
            defined += 1;
        }
    }
    assert!(defined > 100, "only {defined} names found: the header is not understood");
    assert!(!header.contains("enum"), "the header has enums now: compare them as well");

    let mut words =
        header.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|w| !w.is_empty());
    let mut structs = BTreeSet::new();
    while let Some(word) = words.next() {
        if word == "struct" {
            structs.extend(words.next());
        }
    }
    for name in structs {
        assert!(layouts.contains(name), "struct {name} is in the header and not in uapi");
    }

    // Fields: everything between a struct's braces that precedes a semicolon.
    for layout in LAYOUTS {
        let Some(at) = header.find(&format!("struct {} {{", layout.name)) else {
            continue;
        };
        let body = &header[at..];
        let body = &body[body.find('{').unwrap() + 1..body.find("\n};").unwrap()];
        for declaration in body.split(';') {
            let declaration = declaration.lines().filter(|l| !l.trim_start().starts_with('#'));
            let declaration: String = declaration.collect::<Vec<_>>().join(" ");
            let name = declaration.split(['[', '}']).next().unwrap();
            let Some(name) = name.split_whitespace().last() else {
                continue;
            };
            // The second names of the two unions are compared by their offsets.
            let fine = layout.fields.iter().any(|(field, ..)| *field == name)
                || ["nr_zones", "zone_append_lba"].contains(&name);
            assert!(fine, "{}.{name} is in the header and not in uapi", layout.name);
        }
    }
}
