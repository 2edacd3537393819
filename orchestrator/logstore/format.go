package logstore

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// A segment file, all numbers little-endian:
//
//	segment head  32 bytes: magic 8, number 8, id 8, size of the file 4, sum 4
//	batch         head 32 bytes: magic 4, length of the records 4, sequence 8,
//	              zero 12, sum 4; then the records; then zeros to a multiple of 32
//	batch ...     its first batch is a span and all keys, see headRecords
//	zeros         to the end of the file: room for batches to come
//
// A record is a head of 12 bytes (kind 1, zero 3, length of the body 4, sum 4)
// and a body (record.go). Every sum is a CRC-32C over the segment's id, the
// offset of what it belongs to, and that itself: bytes are valid in their place
// only. The id is random, so no entry's data can pass for a batch.
const (
	segmentMagic = "weftlog\x01" // with the version of the format
	batchMagic   = "btch"
	headBytes    = 32
	recordHead   = 12
	// alignment of batches, so that a head lies in one sector.
	alignment = 32
	// sectorBytes are written by a disk as a whole or not at all.
	sectorBytes = 512
	// maxBatch bounds what one write may hold; entries are far smaller.
	maxBatch = 1 << 30
)

func checksum(id uint64, off int64, a, b []byte) uint32 {
	var place [16]byte
	binary.LittleEndian.PutUint64(place[:], id)
	binary.LittleEndian.PutUint64(place[8:], uint64(off))
	t := crc32.MakeTable(crc32.Castagnoli) // made once by the library
	return crc32.Update(crc32.Update(crc32.Update(0, t, place[:]), t, a), t, b)
}

// appendSegmentHead adds the head of a segment to an empty buffer.
func appendSegmentHead(buf []byte, number, id uint64, size int64) []byte {
	buf = append(buf, segmentMagic...)
	buf = binary.LittleEndian.AppendUint64(buf, number)
	buf = binary.LittleEndian.AppendUint64(buf, id)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(size))
	return binary.LittleEndian.AppendUint32(buf, checksum(id, 0, buf, nil))
}

// readSegmentHead returns the id of the segment that data is.
func readSegmentHead(data []byte, number uint64) (uint64, error) {
	if len(data) < headBytes {
		return 0, fmt.Errorf("the file has %d bytes", len(data))
	}
	id := binary.LittleEndian.Uint64(data[16:])
	switch {
	case binary.LittleEndian.Uint32(data[28:]) != checksum(id, 0, data[:28], nil):
		return 0, fmt.Errorf("the head of the file is damaged")
	case string(data[:8]) != segmentMagic:
		return 0, fmt.Errorf("the file is of format %q, this build reads %q", data[:8], segmentMagic)
	case binary.LittleEndian.Uint64(data[8:]) != number:
		return 0, fmt.Errorf("the file says that it is number %d", binary.LittleEndian.Uint64(data[8:]))
	case int64(binary.LittleEndian.Uint32(data[24:])) != int64(len(data)):
		return 0, fmt.Errorf("the file has %d bytes, and was made with %d", len(data), binary.LittleEndian.Uint32(data[24:]))
	}
	return id, nil
}

// placed is a record with where it lies in its segment.
type placed struct {
	record
	off int64
	n   int // with its head
}

func aligned(n int64) int64 { return (n + alignment - 1) &^ (alignment - 1) }

// batchBytes is what a batch of records takes in a segment.
func batchBytes(records []record) int64 {
	n := int64(headBytes)
	for i := range records {
		n += recordHead + int64(records[i].bodyBytes())
	}
	return aligned(n)
}

// appendBatch adds a batch to buf, which will lie at off in the segment.
func appendBatch(buf []byte, id uint64, off int64, sequence uint64, records []record) ([]byte, []placed) {
	begin := len(buf)
	at := func() int64 { return off + int64(len(buf)-begin) }
	buf = append(buf, make([]byte, headBytes)...)
	out := make([]placed, 0, len(records))
	for i := range records {
		p, start := placed{record: records[i], off: at()}, len(buf)
		buf = append(buf, byte(records[i].kind), 0, 0, 0)
		buf = binary.LittleEndian.AppendUint32(buf, uint32(records[i].bodyBytes()))
		buf = append(buf, 0, 0, 0, 0)
		buf = records[i].appendBody(buf)
		binary.LittleEndian.PutUint32(buf[start+8:], checksum(id, p.off, buf[start:start+8], buf[start+recordHead:]))
		p.n = len(buf) - start
		out = append(out, p)
	}
	head := buf[begin : begin+headBytes]
	copy(head, batchMagic)
	binary.LittleEndian.PutUint32(head[4:], uint32(len(buf)-begin-headBytes))
	binary.LittleEndian.PutUint64(head[8:], sequence)
	binary.LittleEndian.PutUint32(head[28:], checksum(id, off, head[:28], nil))
	return append(buf, make([]byte, aligned(int64(len(buf)-begin))-int64(len(buf)-begin))...), out
}

// batchHead is the head of a batch that passed its check.
type batchHead struct {
	sequence uint64
	end      int64 // of the records; the next batch begins at aligned(end)
}

// readBatchHead reads the head at off. A head is good only if its batch fits in
// the file.
func readBatchHead(data []byte, id uint64, off int64) (batchHead, bool) {
	if off < 0 || off > int64(len(data))-headBytes {
		return batchHead{}, false
	}
	head := data[off : off+headBytes]
	if string(head[:4]) != batchMagic || binary.LittleEndian.Uint32(head[28:]) != checksum(id, off, head[:28], nil) {
		return batchHead{}, false
	}
	h := batchHead{sequence: binary.LittleEndian.Uint64(head[8:]), end: off + headBytes + int64(binary.LittleEndian.Uint32(head[4:]))}
	return h, h.end <= int64(len(data)) && h.end > off+headBytes
}

// readBatch reads the batch at off; ok is false unless it is whole. The records
// point into data.
func readBatch(data []byte, id uint64, off int64) (h batchHead, records []placed, ok bool) {
	h, ok = readBatchHead(data, id, off)
	if !ok {
		return h, nil, false
	}
	for off += headBytes; off < h.end; {
		r, err := readRecord(data[off:h.end], id, off)
		if err != nil {
			return h, nil, false
		}
		records, off = append(records, r), off+int64(r.n)
	}
	return h, records, true
}

// readRecord reads the record that data begins with and that lies at off in
// its segment.
func readRecord(data []byte, id uint64, off int64) (placed, error) {
	if len(data) < recordHead {
		return placed{}, fmt.Errorf("record of %d bytes", len(data))
	}
	n := int64(binary.LittleEndian.Uint32(data[4:]))
	if n > int64(len(data)-recordHead) {
		return placed{}, fmt.Errorf("record is longer than its batch")
	}
	body := data[recordHead : recordHead+n]
	if binary.LittleEndian.Uint32(data[8:]) != checksum(id, off, data[:8], body) {
		return placed{}, fmt.Errorf("checksum of a record is wrong")
	}
	r, err := decodeBody(kind(data[0]), body)
	return placed{record: r, off: off, n: recordHead + int(n)}, err
}

// isZero says whether data is zeros throughout.
func isZero(data []byte) bool {
	for len(data) > 0 {
		n := min(len(data), sectorBytes)
		if !bytes.Equal(data[:n], zeroSector[:n]) {
			return false
		}
		data = data[n:]
	}
	return true
}

var zeroSector [sectorBytes]byte
