#!/bin/sh
# The guest's first process after the initramfs, run by the host's own static busybox: settings, then the agent.
. /run/rig.env
cd /
export PATH="$RIG_PATH" HOME="$RIG_HOME" LANG=C.UTF-8 TERM=dumb PYTHONDONTWRITEBYTECODE=1
# A task that hangs must be seen within a test; a CPU that merely waits for the emulator must not.
echo "$RIG_HUNG_TASK_SECS" > /proc/sys/kernel/hung_task_timeout_secs
echo 5 > /proc/sys/kernel/hung_task_check_interval_secs
echo -1 > /proc/sys/kernel/hung_task_warnings
echo "$RIG_LOCKUP_SECS" > /proc/sys/kernel/watchdog_thresh
"$RIG_BUSYBOX" mkdir -p "$RIG_SHARED_AT"
"$RIG_BUSYBOX" mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none shared "$RIG_SHARED_AT"
"$RIG_PYTHON" -I -S "$RIG_PACKAGE/agent.py" > /dev/console 2>&1
"$RIG_BUSYBOX" poweroff -f
