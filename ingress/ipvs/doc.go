// Package ipvs is the balancing engine on the kernel's IP virtual server, for
// service addresses on the bridge overlay. Published ports are another engine's
// (ingress.Split).
//
// It owns, in each network's hidden namespace: the device weft.BalancerName with
// its routes and neighbours, all IPVS services, the settings that they need, and
// by package nft the table that leads packets there. The bridge and what is on it
// are the overlay engine's. No goroutine; Apply is called by one at a time.
package ipvs
