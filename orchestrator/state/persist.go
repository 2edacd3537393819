package state

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/fxamacker/cbor/v2"
	"github.com/hashicorp/go-memdb"

	"github.com/weftnet/weft"
)

// SnapshotVersion follows the magic of a stored snapshot. Version 2 added what
// rests; a snapshot of version 1 is one in which nothing does.
const SnapshotVersion byte = 2

// oldestSnapshot is the oldest version that Restore reads.
const oldestSnapshot byte = 1

// magic begins a snapshot file, so that a foreign file is not taken for one.
const magic = "weft state "

// record is one element of the CBOR sequence (RFC 8742) that follows magic and
// version: an object, or the trailer that proves completeness.
type record struct {
	Cluster *weft.Cluster     `cbor:",omitempty"`
	Node    *weft.Node        `cbor:",omitempty"`
	Network *weft.Network     `cbor:",omitempty"`
	Service *weft.Service     `cbor:",omitempty"`
	Spec    *weft.SpecVersion `cbor:",omitempty"`
	Task    *weft.Task        `cbor:",omitempty"`
	Resting *RestingAddr      `cbor:",omitempty"`
	RestNet *RestingNetwork   `cbor:",omitempty"`
	End     *trailer          `cbor:",omitempty"`
}

type trailer struct {
	Index   uint64 // of the newest applied entry
	Records uint64 // before this one
}

// Persist streams the view to w. Equal states give equal bytes.
func (s *Snapshot) Persist(w io.Writer) error {
	bw := bufio.NewWriterSize(w, 64<<10)
	if _, err := bw.WriteString(magic + string(rune(SnapshotVersion))); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	enc := encMode.NewEncoder(bw)
	var n uint64
	put := func(r record) error {
		n++
		if err := enc.Encode(r); err != nil {
			return fmt.Errorf("write snapshot record %d: %w", n, err)
		}
		return nil
	}
	for _, t := range []struct {
		table string
		rec   func(any) record
	}{
		{tCluster, func(r any) record { return record{Cluster: r.(*weft.Cluster)} }},
		{tNodes, func(r any) record { return record{Node: r.(*weft.Node)} }},
		{tNetworks, func(r any) record { return record{Network: r.(*weft.Network)} }},
		{tServices, func(r any) record { return record{Service: r.(*weft.Service)} }},
		{tSpecs, func(r any) record { return record{Spec: r.(*weft.SpecVersion)} }},
		{tTasks, func(r any) record { return record{Task: r.(*weft.Task)} }},
		{tResting, func(r any) record { return record{Resting: r.(*RestingAddr)} }},
		{tRestingNets, func(r any) record { return record{RestNet: r.(*RestingNetwork)} }},
	} {
		it, err := s.txn.Get(t.table, byID)
		if err != nil {
			return fmt.Errorf("write snapshot of %s: %w", t.table, err)
		}
		for raw := it.Next(); raw != nil; raw = it.Next() {
			if err := put(t.rec(raw)); err != nil {
				return err
			}
		}
	}
	if err := put(record{End: &trailer{Index: s.index, Records: n}}); err != nil {
		return err
	}
	if err := bw.Flush(); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	return nil
}

// Restore replaces the whole state by a snapshot; on an error the old state
// stays. Subscribers get All.
func (s *Store) Restore(r io.Reader) error {
	db, index, err := load(r)
	if err != nil {
		return fmt.Errorf("restore snapshot: %w", err)
	}
	s.mu.Lock()
	s.db, s.index = db, index
	s.mu.Unlock()
	c := newChanged()
	c.All = true
	s.publish(&c)
	return nil
}

func load(r io.Reader) (*memdb.MemDB, uint64, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head := make([]byte, len(magic)+1)
	if _, err := io.ReadFull(br, head); err != nil {
		return nil, 0, fmt.Errorf("read its head: %w", err)
	}
	if string(head[:len(magic)]) != magic {
		return nil, 0, fmt.Errorf("it does not begin with %q: not a snapshot of weft", magic)
	}
	if v := head[len(magic)]; v < oldestSnapshot || v > SnapshotVersion {
		return nil, 0, fmt.Errorf("version %d is not known to this build (it knows %d to %d): run the weft that wrote it, or a newer one", v, oldestSnapshot, SnapshotVersion)
	}
	db := newDB()
	txn := db.Txn(true)
	defer txn.Abort()
	dec := decMode.NewDecoder(br)
	for n := uint64(0); ; n++ {
		var rec record
		if err := dec.Decode(&rec); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return nil, 0, fmt.Errorf("it ends after record %d without its trailer: %w", n, io.ErrUnexpectedEOF)
			}
			return nil, 0, fmt.Errorf("read record %d: %w", n+1, err)
		}
		if rec.End != nil {
			if rec.End.Records != n {
				return nil, 0, fmt.Errorf("its trailer counts %d records, %d were read", rec.End.Records, n)
			}
			if err := atEnd(dec); err != nil {
				return nil, 0, err
			}
			txn.Commit()
			return db, rec.End.Index, nil
		}
		if err := insert(txn, &rec); err != nil {
			return nil, 0, fmt.Errorf("store record %d: %w", n+1, err)
		}
	}
}

func atEnd(dec *cbor.Decoder) error {
	var more record
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return errors.New("data follow its trailer")
	}
	return nil
}

func insert(txn *memdb.Txn, r *record) error {
	switch {
	case r.Cluster != nil:
		return txn.Insert(tCluster, r.Cluster)
	case r.Node != nil:
		return txn.Insert(tNodes, r.Node)
	case r.Network != nil:
		return txn.Insert(tNetworks, r.Network)
	case r.Service != nil:
		return txn.Insert(tServices, r.Service)
	case r.Spec != nil:
		return txn.Insert(tSpecs, r.Spec)
	case r.Task != nil:
		return txn.Insert(tTasks, r.Task)
	case r.Resting != nil:
		return txn.Insert(tResting, r.Resting)
	case r.RestNet != nil:
		return txn.Insert(tRestingNets, r.RestNet)
	}
	return errors.New("it is of a kind that this build does not know")
}
