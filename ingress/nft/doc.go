// Package nft is the balancing engine made of nftables alone: it needs no
// module beside those that every kernel of the last years has.
//
// Service addresses are balanced on the bridge of each network by rewriting
// the destination's hardware address (direct return: the backend holds the
// service address itself and answers by itself, so that there is no address
// translation and no connection tracking on the way). Published ports are
// translated in the host's namespace and sent on from the host's own address on
// the ingress network; the client's address is therefore rewritten.
//
// Everything stands in tables named weft.TableName, one of family bridge in
// each network's hidden namespace and one of family ip in the host's. Nothing
// else is read or written. The kernel is the state: the package keeps only what
// spares it a read. Apply is called by one goroutine at a time.
package nft
