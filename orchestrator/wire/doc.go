// Package wire is the talk between nodes: one TLS 1.3 port (2377) that serves
// gRPC, Raft and joining by ALPN, and the messages on it.
//
// It owns the port, who may call what (the table in access.go), the encoding
// of messages, and finding the leader. It does not own what the calls do: the
// orchestrator implements Control, Dispatcher and Membership on the leader,
// the agent implements Agent.
//
// The daemon runs Server.Run, Client.Run and Peers.Run as siblings until it
// stops; every exported method is safe for concurrent use.
package wire
