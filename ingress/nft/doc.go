// Package nft is the balancing engine made of nftables alone: it needs no
// module beside those that every kernel of the last years has.
//
// Service addresses are balanced on the bridge of each network by rewriting
// the destination's hardware address (direct return: the backend holds the
// service address itself and answers by itself, so that there is no address
// translation and no connection tracking on the way). Published ports are
// translated in the host's namespace; the client's address stays, and tables in
// the tasks' namespaces send the answers back by the node of entry.
//
// Everything stands in tables of weft's own: one of family bridge in each
// network's hidden namespace, one of each family in the host's, and in those of
// tasks, with one table of routes and the rules that lead to it. Nothing else is
// read or written. The kernel is the state: the package keeps only what
// spares it a read. Apply is called by one goroutine at a time.
package nft
