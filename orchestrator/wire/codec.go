package wire

import (
	"fmt"
	"sync"

	"github.com/fxamacker/cbor/v2"
	"google.golang.org/grpc/mem"

	"github.com/weftnet/weft"
)

// Bounds of what is read from a peer.
const (
	// maxRequest bounds a call to a server: the largest is a report of a
	// node's tasks, some 200 bytes each.
	maxRequest = 8 << 20
	// maxAnswer bounds an answer or a streamed message. The largest is a
	// list of all tasks, some 700 bytes each: about 90,000 tasks.
	maxAnswer = 64 << 20
	// maxJoin bounds the request of a node that has proven nothing yet.
	maxJoin = 64 << 10
	// maxNesting: the deepest message (a list of services with specs) has 9
	// levels.
	maxNesting = 24
	// maxElements of one list or map. A byte on the wire (null) can become
	// a whole struct in memory, some 700 bytes, so this bounds memory too.
	maxElements = 1 << 17
)

// codecName is the content-subtype: application/grpc+weft-cbor.
const codecName = "weft-cbor"

// modes are the encoder and decoder of all messages. They are immutable.
var modes = sync.OnceValues(func() (cbor.EncMode, cbor.DecMode) {
	enc, err := cbor.EncOptions{
		Sort:        cbor.SortBytewiseLexical, // deterministic: RFC 8949 section 4.2.1
		Time:        cbor.TimeRFC3339NanoUTC,  // whole nanoseconds; the zero time is null
		IndefLength: cbor.IndefLengthForbidden,
		TagsMd:      cbor.TagsForbidden,
	}.EncMode()
	if err != nil {
		panic(err) // the options are constant
	}
	dec, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		MaxNestedLevels:   maxNesting,
		MaxArrayElements:  maxElements,
		MaxMapPairs:       maxElements,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		// Paths, environment and log lines of Linux are bytes, not text.
		UTF8: cbor.UTF8DecodeInvalid,
		// Unknown fields are not errors: newer nodes may send more.
	}.DecMode()
	if err != nil {
		panic(err) // the options are constant
	}
	return enc, dec
})

func encode(v any) ([]byte, error) {
	enc, _ := modes()
	b, err := enc.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", v, err)
	}
	return b, nil
}

func decode(b []byte, v any) error {
	_, dec := modes()
	if err := dec.Unmarshal(b, v); err != nil {
		return fmt.Errorf("decode %T: %w: %w", v, err, weft.ErrInvalid)
	}
	return nil
}

// codec is gRPC's view of encode and decode.
type codec struct{}

func (codec) Name() string { return codecName }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	b, err := encode(v)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return decode(buf.ReadOnlyData(), v) // decode copies what it keeps
}
