package ingresstest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// sctpPacket is a packet of SCTP with one chunk (RFC 9260 section 3).
type sctpPacket struct {
	from, to uint16
	tag      uint32
	kind     byte // of the chunk
	flags    byte
	value    []byte
}

// Chunks (RFC 9260 section 3.2) and parameters (section 3.3) that are spoken here.
const (
	chunkData             = 0
	chunkInit             = 1
	chunkInitAck          = 2
	chunkSack             = 3
	chunkAbort            = 6
	chunkShutdown         = 7
	chunkShutdownAck      = 8
	chunkCookieEcho       = 10
	chunkCookieAck        = 11
	chunkShutdownComplete = 14

	paramCookie = 7
	// flagTag (T) is set in an ABORT that bears the tag of what it answers.
	flagTag = 1
	// flagsWhole (B, E) are those of data that are one message.
	flagsWhole = 3
)

const (
	sctpHeader  = 12
	chunkHeader = 4
	initBytes   = 16 // of an INIT before its parameters: tag, window, streams, first TSN
	dataBytes   = 12 // of DATA before the text: TSN, stream, its number, payload protocol
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errSum says that a packet's sum (CRC32c, RFC 9260 appendix A) is not that of its bytes.
var errSum = errors.New("wrong sum of SCTP")

func (p *sctpPacket) marshal() []byte {
	b := make([]byte, sctpHeader+chunkHeader, sctpHeader+chunkHeader+len(p.value)+3)
	binary.BigEndian.PutUint16(b, p.from)
	binary.BigEndian.PutUint16(b[2:], p.to)
	binary.BigEndian.PutUint32(b[4:], p.tag)
	b[sctpHeader], b[sctpHeader+1] = p.kind, p.flags
	binary.BigEndian.PutUint16(b[sctpHeader+2:], uint16(chunkHeader+len(p.value)))
	b = append(b, p.value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, castagnoli))
	return b
}

// parseSCTP reads the first chunk of a packet, also of one whose sum is wrong (errSum). b is
// not kept.
func parseSCTP(b []byte) (p sctpPacket, err error) {
	if len(b) < sctpHeader+chunkHeader {
		return p, fmt.Errorf("a packet of SCTP of %d bytes", len(b))
	}
	b = append([]byte(nil), b...)
	sum := binary.LittleEndian.Uint32(b[8:])
	clear(b[8:12])
	isWhole := crc32.Checksum(b, castagnoli) == sum
	size := int(binary.BigEndian.Uint16(b[sctpHeader+2:]))
	if size < chunkHeader || sctpHeader+size > len(b) {
		return p, fmt.Errorf("a chunk of SCTP of %d bytes in a packet of %d", size, len(b))
	}
	p = sctpPacket{
		from: binary.BigEndian.Uint16(b), to: binary.BigEndian.Uint16(b[2:]), tag: binary.BigEndian.Uint32(b[4:]),
		kind: b[sctpHeader], flags: b[sctpHeader+1], value: b[sctpHeader+chunkHeader : sctpHeader+size],
	}
	if !isWhole {
		return p, errSum
	}
	return p, nil
}

// initValue is that of an INIT, or with a cookie of an INIT ACK.
func initValue(tag uint32, cookie []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, tag)
	b = binary.BigEndian.AppendUint32(b, 1<<16) // window
	b = append(b, 0, 1, 0, 1)                   // streams
	b = binary.BigEndian.AppendUint32(b, 1)     // first TSN
	if cookie != nil {
		b = binary.BigEndian.AppendUint16(b, paramCookie)
		b = append(binary.BigEndian.AppendUint16(b, uint16(4+len(cookie))), cookie...)
	}
	return b
}

// cookieOf is the cookie of an INIT ACK; nil = it has none.
func cookieOf(value []byte) []byte {
	for b := value[min(len(value), initBytes):]; len(b) >= 4; {
		size := int(binary.BigEndian.Uint16(b[2:]))
		if size < 4 || size > len(b) {
			return nil
		}
		if binary.BigEndian.Uint16(b) == paramCookie {
			return b[4:size]
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return nil
}

func dataValue(tsn uint32, text []byte) []byte {
	return append(append(binary.BigEndian.AppendUint32(nil, tsn), make([]byte, dataBytes-4)...), text...)
}

// sackValue acknowledges all up to a TSN.
func sackValue(tsn uint32) []byte {
	return append(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, tsn), 1<<16), 0, 0, 0, 0)
}
