#!/bin/busybox sh
# The guest's first process, in the initramfs: load what it takes to see the host's root, put a throw-away
# overlay over it, and go there.
B=/bin/busybox
fail() { echo "ublk-vm: $*" > /dev/console; $B poweroff -f; }
$B mkdir -p /proc /sys /dev /lower /upper /root
$B mount -t devtmpfs dev /dev
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
. /rig.env
while read -r m; do $B insmod "/modules/$m" || fail "insmod $m"; done < /modules/order
$B mount -t tmpfs -o size=60% tmpfs /upper
$B mkdir /upper/u /upper/w
# loose: the host's tree is taken as frozen while a guest runs; what must be seen changing goes through the
# artefact folder.
$B mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro root /lower || fail "mount of the host's root"
$B mount -t overlay -o lowerdir=/lower,upperdir=/upper/u,workdir=/upper/w overlay /root || fail "overlay"
R=/root
$B mount -t proc proc $R/proc
$B mount -t sysfs sys $R/sys
$B mount -t devtmpfs dev $R/dev
$B mount -t tmpfs run $R/run
$B mkdir -p $R/dev/pts $R/dev/shm
$B mount -t devpts pts $R/dev/pts
$B mount -t tmpfs shm $R/dev/shm
$B mount -t cgroup2 cgroup $R/sys/fs/cgroup
$B mount -t debugfs debug $R/sys/kernel/debug
$B mount -t tracefs trace $R/sys/kernel/tracing
$B ln -sfn /proc/self/fd $R/dev/fd
$B ln -sfn fd/0 $R/dev/stdin
$B ln -sfn fd/1 $R/dev/stdout
$B ln -sfn fd/2 $R/dev/stderr
read -r release < /proc/sys/kernel/osrelease
$B mkdir -p $R/lib/modules
$B ln -sfn "$RIG_MODULES/lib/modules/$release" "$R/lib/modules/$release"
$B ip link set lo up
$B cp /rig.env $R/run/rig.env
$B umount /sys
$B umount /proc
$B umount -l /dev
exec $B switch_root /root "$RIG_BUSYBOX" sh "$RIG_PACKAGE/guest_init.sh"
