#!/bin/sh
# The first process of one node of Docker Engine: docker-node.sh NUMBER, in mount,
# process and host name namespaces of its own and in the network namespace of the
# node's host. What the daemons keep is the node's own; its socket is at
# /var/lib/node/NUMBER/docker.sock for all.
set -e
dir=/var/lib/node/$1
mount --make-rprivate /
mount -t proc proc /proc
umount -l /sys/fs/cgroup
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
hostname "node$1"
for name in docker containerd; do
  mkdir -p "$dir/$name" "/run/$name" "/var/lib/$name"
  mount -t tmpfs tmpfs "/run/$name"
  mount --bind "$dir/$name" "/var/lib/$name"
done
# Engine starts a containerd of its own, but gives it too little time in a guest
# that counts instructions.
cat >"$dir/containerd.toml" <<'C'
version = 3
disabled_plugins = ["io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
C
containerd --config "$dir/containerd.toml" >"$dir/containerd.log" 2>&1 &
# Containers of services cannot be told to go without the filter of system calls.
while [ ! -S /run/containerd/containerd.sock ]; do sleep 0.1; done
dockerd --seccomp-profile unconfined --containerd /run/containerd/containerd.sock -H "unix://$dir/docker.sock" --exec-root /run/docker --pidfile /run/docker/pid >"$dir/docker.log" 2>&1
