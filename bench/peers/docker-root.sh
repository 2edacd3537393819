#!/bin/bash
# Makes a root folder with Docker Engine of Debian's suite SUITE (docker.io 28.5 in
# forky) for the guest of `bench docker`: packages are downloaded by lists of their
# own and unpacked to bin/cache/docker-root. Nothing is installed on this machine and no
# package's script is run. Prints nothing when the folder is there.
set -euo pipefail
cd "$(dirname "$0")/../.."
SUITE=forky
root=$PWD/bin/cache/docker-root
[ ! -e "$root" ] || exit 0

fail() { echo "docker-root.sh: $*" >&2; exit 1; }
command -v apt-get >/dev/null || fail "no apt-get to fetch Docker Engine with"
[ "$(uname -m)" = x86_64 ] || fail "the guest is amd64 only, this machine is $(uname -m)"

work=$PWD/bin/cache/docker-root.tmp
rm -rf "$work"
mkdir -p "$work"/{lists/partial,archives/partial,root}
: >"$work/status" # what this machine has installed does not count
# The archive that this machine's own Debian comes from.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' | grep -v -e security -e debug | grep debian | head -n 1) || true
[ -n "$mirror" ] || { echo "cannot tell which archive the Debian packages of this machine come from: apt-get indextargets names none" >&2; exit 1; }
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $SUITE main" >"$work/sources.list"
apt=(apt-get -q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferencesparts=/dev/null
  -o "Dir::State=$work" -o "Dir::State::status=$work/status" -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work" -o "Dir::Cache::archives=$work/archives"
  -o APT::Sandbox::User=root -o APT::Install-Recommends=0 -o Acquire::Languages=none)
echo "fetching Docker Engine of $SUITE" >&2
"${apt[@]}" update >/dev/null || fail "apt-get update of $SUITE failed"
"${apt[@]}" -y --download-only install docker.io docker-cli containerd runc tini iptables iproute2 kmod >"$work/apt.log" 2>&1 ||
  fail "could not fetch docker.io of $SUITE: $(tail -n 3 "$work/apt.log")"
for d in bin sbin lib lib64; do
  mkdir -p "$work/root/usr/$d"
  ln -s "usr/$d" "$work/root/$d"
done
for deb in "$work"/archives/*.deb; do
  dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$work/root" --keep-directory-symlink --exclude=./usr/share/doc --exclude=./usr/share/man --exclude=./usr/share/locale ||
    fail "could not unpack $deb"
done
# What update-alternatives would have made.
for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
  ln -sf xtables-nft-multi "$work/root/usr/sbin/$name"
done
[ -x "$work/root/usr/sbin/dockerd" ] || [ -x "$work/root/usr/bin/dockerd" ] || fail "docker.io of $SUITE has no dockerd"
dpkg-deb -f "$work"/archives/docker.io_*.deb Version >"$work/root/etc/docker-version"
mv "$work/root" "$root"
rm -rf "$work"
