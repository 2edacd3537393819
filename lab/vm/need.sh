#!/bin/bash
# Makes sure that what the arguments name is on this machine:
#   runc gcc qemu           installed with apt-get where the command is missing
#   busybox                 where the busybox command is missing or needs libraries, Debian's
#                           static one, unpacked to bin/cache/busybox
#   docker                  where there is no docker command, the client of Debian's
#                           package, unpacked to bin/cache/docker (no engine is started)
#   kernel                  Debian's cloud kernel, unpacked to bin/cache/kernel (not installed)
#   kernel-new              the cloud kernel of a later Debian (SUITE below), which has what the
#                           first lacks (tcx), unpacked to bin/cache/kernel-new (not installed)
# Prints nothing when all is there. Exit code 1 names what could not be had.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
cache=$PWD/bin/cache
sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
updated=

fail() { echo "need.sh: $*" >&2; exit 1; }

update() {
  [ -z "$updated" ] || return 0
  updated=yes
  $sudo apt-get -q update >/dev/null || fail "apt-get update failed"
}

# install COMMAND PACKAGE
install() {
  command -v "$1" >/dev/null && return 0
  command -v apt-get >/dev/null || fail "no $1, and no apt-get to install $2 with"
  update
  echo "installing $2" >&2
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "$2" >/dev/null ||
    fail "could not install $2"
}

# unpack PACKAGE DIR: downloads and unpacks without installing
unpack() {
  local tmp; tmp=$(mktemp -d)
  (cd "$tmp" && apt-get -q download "$1" >/dev/null) || { rm -rf "$tmp"; return 1; }
  mkdir -p "$2"
  dpkg-deb -x "$tmp"/*.deb "$2" || { rm -rf "$tmp"; return 1; }
  rm -rf "$tmp"
}

docker_client() {
  command -v docker >/dev/null && return 0
  [ -x "$cache/docker/usr/bin/docker" ] && return 0
  update
  # Newer releases have the client in a package of its own.
  unpack docker-cli "$cache/docker" 2>/dev/null || unpack docker.io "$cache/docker" || fail "could not fetch a docker client"
  [ -x "$cache/docker/usr/bin/docker" ] || unpack docker.io "$cache/docker" || fail "could not fetch a docker client"
}

static_busybox() {
  local have
  # The interpreter's name stands in the first page of one that needs libraries.
  have=$(command -v busybox) && ! head -c 4096 "$have" | grep -q ld-linux && return 0
  [ -d "$cache/busybox" ] && return 0
  update
  echo "unpacking busybox-static" >&2
  rm -rf "$cache/busybox.new"
  unpack busybox-static "$cache/busybox.new" || fail "could not fetch busybox-static"
  mv "$cache/busybox.new" "$cache/busybox"
}

amd64_only() { [ "$(uname -m)" = x86_64 ] || fail "the VM lane knows amd64 only, this machine is $(uname -m)"; }

kernel() {
  amd64_only
  ls "$cache"/kernel/boot/vmlinuz-* >/dev/null 2>&1 && return 0
  update
  local package
  package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ {print $2; exit}')
  [ -n "$package" ] || fail "apt-cache knows no linux-image-cloud-amd64"
  echo "unpacking $package" >&2
  rm -rf "$cache/kernel.new"
  unpack "$package" "$cache/kernel.new" || fail "could not fetch $package"
  mv "$cache/kernel.new" "$cache/kernel"
}

# The release that kernel-new comes from.
SUITE=trixie

# later APT-COMMAND...: asks for packages of SUITE, by lists of its own: what apt
# knows and installs on this machine stays as it is.
later() {
  local apt=$cache/apt-$SUITE mirror
  if [ ! -e "$apt/sources.list" ]; then
    # The archive that this machine's own Debian comes from.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' | grep -v -e security -e debug | grep debian | head -n 1) || true
    mkdir -p "$apt/lists/partial" "$apt/archives/partial"
    [ -n "$mirror" ] || { echo "cannot tell which archive the Debian packages of this machine come from: apt-get indextargets names none" >&2; exit 1; }
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $SUITE main" >"$apt/sources.list"
  fi
  local options=(-q -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt" -o APT::Sandbox::User=root -o Acquire::Languages=none)
  "$1" "${options[@]}" "${@:2}"
}

kernel_new() {
  amd64_only
  ls "$cache"/kernel-new/boot/vmlinuz-* >/dev/null 2>&1 && return 0
  command -v apt-get >/dev/null || fail "no apt-get to fetch the kernel of $SUITE with"
  later apt-get update >/dev/null || fail "apt-get update of $SUITE failed"
  local package tmp
  package=$(later apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ {print $2; exit}')
  [ -n "$package" ] || fail "$SUITE has no linux-image-cloud-amd64"
  echo "unpacking $package of $SUITE" >&2
  rm -rf "$cache/kernel-new.tmp"
  tmp=$(mktemp -d)
  (cd "$tmp" && later apt-get download "$package" >/dev/null) || fail "could not fetch $package of $SUITE"
  dpkg-deb -x "$tmp"/*.deb "$cache/kernel-new.tmp" || fail "could not unpack $package"
  rm -rf "$tmp"
  mv "$cache/kernel-new.tmp" "$cache/kernel-new"
}

for need in "$@"; do
  case $need in
    runc) install runc runc ;;
    gcc) install gcc gcc; [ -e /usr/include/stdlib.h ] || { update; $sudo apt-get -q -y install --no-install-recommends libc6-dev >/dev/null; } ;;
    qemu) install qemu-system-x86_64 qemu-system-x86; install mke2fs e2fsprogs ;;
    busybox) static_busybox ;;
    docker) docker_client ;;
    kernel) kernel ;;
    kernel-new) kernel_new ;;
    *) fail "do not know how to get $need" ;;
  esac
done
