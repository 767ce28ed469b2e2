//! Who keeps a device from going away.

use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Something that keeps a device's disk or its `/dev/ublkcN` in use.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Holder {
    /// A process that has it open.
    Process {
        /// Its id.
        pid: u32,
        /// Its name, as `comm` says it.
        name: String,
        /// Whether it is the disk that it has open, and not the server's node.
        disk: bool,
    },
    /// A file system on the disk, or on a partition of it, mounted in this mount namespace.
    Mount(PathBuf),
    /// A block device on top of the disk: device mapper, RAID, loop.
    Claim(String),
    /// Swap on the disk.
    Swap,
    /// The kernel says that the disk is open, or claimed; by whom cannot be seen from here (another namespace,
    /// a missing privilege, or the kernel itself, which reads a new disk's partition table).
    Unseen,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Process { pid, name, disk } => {
                write!(
                    f,
                    "{name} (pid {pid}) has the {} open",
                    if *disk { "disk" } else { "server's node" }
                )
            }
            Holder::Mount(point) => write!(f, "it is mounted on {}", point.display()),
            Holder::Claim(name) => write!(f, "{name} is on top of it"),
            Holder::Swap => f.write_str("it is swapped to"),
            Holder::Unseen => f.write_str("it is open somewhere that cannot be seen from here"),
        }
    }
}

/// The numbers of a device's nodes, and what is on top of its disk: what sysfs forgets while the
/// device goes away.
pub(crate) struct Nodes {
    id: u32,
    node: Option<u64>,
    disks: Vec<u64>,
    claims: Vec<Holder>,
}

impl Nodes {
    pub(crate) fn of(sys: &Path, id: u32) -> Self {
        let disk = sys.join(format!("class/block/ublkb{id}"));
        // The disk and its partitions, whose directories lie in the disk's.
        let parts = list(&disk).into_iter().filter(|p| p.join("partition").exists());
        let disks: Vec<_> = std::iter::once(disk.clone()).chain(parts).collect();
        let claims = disks.iter().flat_map(|d| list(&d.join("holders")));
        Nodes {
            id,
            node: number(&sys.join(format!("class/ublk-char/ublkc{id}/dev"))),
            claims: claims
                .filter_map(|c| Some(Holder::Claim(c.file_name()?.to_str()?.into())))
                .collect(),
            disks: disks.iter().filter_map(|d| number(&d.join("dev"))).collect(),
        }
    }
}

/// The holders of a device that this process can see: it sees every process as root and its own
/// user's otherwise, and mounts of its own mount namespace only.
pub(crate) fn holders(proc: &Path, nodes: &Nodes) -> Vec<Holder> {
    let Nodes { id, node, disks: numbers, claims } = nodes;
    let mut found = claims.clone();
    let mounts = fs::read_to_string(proc.join("self/mountinfo")).unwrap_or_default();
    found.extend(mounts.lines().filter_map(|line| mounted(line, numbers)).map(Holder::Mount));
    let swaps = fs::read_to_string(proc.join("swaps")).unwrap_or_default();
    let name = format!("/dev/ublkb{id}");
    let is_swap = |path: &str| {
        path.strip_prefix(&name).is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
    };
    if swaps.lines().filter_map(|line| line.split_whitespace().next()).any(is_swap) {
        found.push(Holder::Swap);
    }
    for process in list(proc) {
        let Some(pid) = process.file_name().and_then(|n| n.to_str()?.parse().ok()) else {
            continue;
        };
        let open: Vec<_> =
            list(&process.join("fd")).iter().filter_map(|fd| open_number(fd)).collect();
        for disk in [true, false] {
            let holds = open.iter().any(|&(block, number)| {
                block == disk
                    && if disk { numbers.contains(&number) } else { *node == Some(number) }
            });
            if holds {
                let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
                found.push(Holder::Process { pid, name: name.trim().into(), disk });
            }
        }
    }
    found
}

fn list(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

fn number(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    parse_number(text.trim())
}

fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Whether an open file is a block device, and which, or a character device, and which.
fn open_number(fd: &Path) -> Option<(bool, u64)> {
    // Only links into a device directory or to something deleted are worth a stat: it may block on
    // a dead network file system.
    let target = fs::read_link(fd).ok()?;
    if !target.starts_with("/dev") && !target.to_string_lossy().contains("ublk") {
        return None;
    }
    let meta = fs::metadata(fd).ok()?;
    let kind = meta.file_type();
    (kind.is_block_device() || kind.is_char_device()).then(|| (kind.is_block_device(), meta.rdev()))
}

/// The mount point of a line of mountinfo if it is of one of these devices.
fn mounted(line: &str, numbers: &[u64]) -> Option<PathBuf> {
    let mut fields = line.split(' ');
    let number = parse_number(fields.nth(2)?)?;
    let point = fields.nth(1)?;
    // Blanks are written in octal.
    numbers.contains(&number).then(|| PathBuf::from(point.replace("\\040", " ")))
}

/// The holders as part of a sentence; empty if none is visible.
pub(crate) fn sentence(holders: &[Holder]) -> String {
    holders.iter().map(Holder::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_says_is_understood() {
        let root = std::env::temp_dir().join(format!("ublk-holders-{}", std::process::id()));
        let (sys, proc) = (root.join("sys"), root.join("proc"));
        fs::create_dir_all(sys.join("class/block/ublkb3/holders/dm-0")).unwrap();
        fs::create_dir_all(sys.join("class/block/ublkb3/ublkb3p1")).unwrap();
        fs::write(sys.join("class/block/ublkb3/dev"), "259:4\n").unwrap();
        fs::write(sys.join("class/block/ublkb3/ublkb3p1/partition"), "1\n").unwrap();
        fs::write(sys.join("class/block/ublkb3/ublkb3p1/dev"), "259:5\n").unwrap();
        fs::create_dir_all(proc.join("self")).unwrap();
        let mounts = "36 25 259:5 / /mnt/a\\040b rw - ext4 /dev/ublkb3p1 rw\n\
                      37 25 259:9 / /mnt/other rw - ext4 /dev/ublkb9 rw\n";
        fs::write(proc.join("self/mountinfo"), mounts).unwrap();
        fs::write(proc.join("swaps"), "Filename Type\n/dev/ublkb30 partition\n").unwrap();
        let found = holders(&proc, &Nodes::of(&sys, 3));
        let expected = [Holder::Claim("dm-0".into()), Holder::Mount("/mnt/a b".into())];
        assert_eq!(found, expected);
        assert_eq!(sentence(&found), "dm-0 is on top of it, it is mounted on /mnt/a b");
        fs::write(proc.join("swaps"), "/dev/ublkb3 partition\n").unwrap();
        assert!(holders(&proc, &Nodes::of(&sys, 3)).contains(&Holder::Swap));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn an_open_device_is_seen() {
        let file = fs::File::open("/dev/null").unwrap();
        let fd = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        assert_eq!(open_number(Path::new(&fd)), Some((false, libc::makedev(1, 3))));
    }
}
