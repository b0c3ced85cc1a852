#!/bin/busybox sh
# First process of the rig, in the initramfs: load the modules, lay an overlay over the host's
# file system (seen read-only by 9p), and go on in it with stage2.sh. What goes wrong is said on
# the console, and then the machine is switched off: the runner outside sees that no status came.

b=/bin/busybox
die() { echo "rig: $*"; $b poweroff -f; }

$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
for module in /modules/*.ko; do
    $b insmod "$module" || die "cannot load ${module##*/}"
done

transport="trans=virtio,version=9p2000.L,msize=524288"
# The host's files do not change while a test runs on them: every cache may be used.
$b mount -t 9p -o "ro,cache=loose,$transport" host /host || die "cannot mount the host's files"
$b mount -t tmpfs -o mode=755 overlay /new || die "no tmpfs"
$b mkdir /new/upper /new/work /new/root
$b mount -t overlay -o "lowerdir=/host,upperdir=/new/upper,workdir=/new/work" overlay /new/root ||
    die "cannot mount the overlay"

new=/new/root
for folder in proc sys dev run tmp; do $b mkdir -p $new/$folder; done
$b mount -t tmpfs -o mode=1777 tmp $new/tmp
$b mount -t tmpfs -o mode=755 run $new/run
$b mkdir $new/run/rig
$b mount -o move /dev $new/dev
$b mkdir -p $new/dev/shm
$b mount -t tmpfs -o mode=1777 shm $new/dev/shm
# The folder that host and guest share: written through, so that nothing is lost if this hangs.
$b mount -t 9p -o "rw,cache=none,$transport" run $new/run/rig || die "cannot mount the run folder"

# What the runner needs of the folders that were just covered is laid back over them.
while read -r source && read -r target; do
    $b mkdir -p "$new$target" && $b mount -o bind "/host$source" "$new$target" ||
        die "cannot bind $target"
done <$new/run/rig/binds

$b cp $b $new/run/busybox
$b umount /proc
exec $b switch_root $new /run/busybox sh /run/rig/stage2.sh
die "switch_root failed"
