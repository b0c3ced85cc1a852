# First process of the rig after switch_root, in the host's file system with an overlay: mount the
# rest, run the command, leave its status and switch off. /run/rig is shared with the runner.

b=/run/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t cgroup2 cgroup2 /sys/fs/cgroup
$b mkdir -p /dev/pts
$b mount -t devpts devpts /dev/pts
[ -e /dev/fd ] || $b ln -s /proc/self/fd /dev/fd
$b ip link set lo up
$b hostname rig
echo 16 >/proc/sys/vm/nr_hugepages # for the tests of memory in huge pages

[ -c /dev/kvm ] || { echo "rig: kvm_amd is loaded, yet there is no /dev/kvm"; $b poweroff -f; }
: >/run/rig/started

# A session of its own, no input, output where the runner reads it. The host's shell, as busybox's
# would take its own mount, ls, … for the host's.
$b setsid /bin/sh /run/rig/command.sh </dev/null >>/run/rig/output.log 2>&1
echo $? >/run/rig/status.new
$b mv /run/rig/status.new /run/rig/status
$b sync
$b poweroff -f
