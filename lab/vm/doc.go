// Package vm boots Debian's cloud kernel in QEMU without hardware
// virtualisation, with a small system on a disk image: busybox, runc, weft and
// the kernel's modules. It is where weft is tested on pure cgroup v2, over a
// reboot, and with kernel features that the test machine may lack (IPVS,
// WireGuard, netem).
//
// A guest has one processor, whose clock counts instructions: its time advances a
// nanosecond with each one that it executes, and with the real time while it idles. How
// long something takes in it tells how many instructions it takes, whatever else the
// machine does.
//
// It owns the image, the boot and the result channel (the serial console); it
// knows nothing of weft but the path of its binary. Tests and bench run it. A
// Machine may boot once at a time.
package vm
