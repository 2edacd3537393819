package orchestrator

import (
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// TestKeyEpochs: keys change once a day where an encrypted network is, or when
// asked, and not before every ready node has taken up the last change.
func TestKeyEpochs(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m, ctx := r.managers[0], r.ctx
		cluster := func() weft.Cluster {
			c, err := m.Cluster(ctx)
			r.must(err)
			return c
		}
		rotate := func() error {
			c := cluster()
			return m.UpdateCluster(ctx, c.Meta.Index, weft.ClusterUpdate{Spec: c.Spec, RotateKeys: true})
		}
		var encrypts *agent
		report := func(epochs ...uint64) {
			keys := []weft.NodeKey{}
			for _, e := range epochs {
				keys = append(keys, weft.NodeKey{Epoch: e, Port: 51820})
			}
			r.must(m.Report(ctx, encrypts.id, wire.Report{Keys: keys}))
		}
		time.Sleep(keyLife)
		if c := cluster(); c.KeyEpoch != 0 {
			t.Errorf("epoch %d without an encrypted network", c.KeyEpoch)
		}
		_, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: "net", Options: map[string]string{weft.OptionEncrypted: ""}})
		r.must(err)
		time.Sleep(time.Second)
		if c := cluster(); c.KeyEpoch != 1 || time.Since(c.KeyEpochAt) > 2*time.Second {
			t.Errorf("keys as old as the cluster are of epoch %d since %s", c.KeyEpoch, c.KeyEpochAt)
		}
		encrypts = r.worker(1)
		other := r.worker(2) // it cannot encrypt, and nobody waits for it
		report(0)
		wantErr(t, "at once", rotate(), weft.ErrConflict, "try again in")
		time.Sleep(keySettle)
		wantErr(t, "a node is behind", rotate(), weft.ErrConflict, "has not yet taken up")
		report(0, 1)
		r.must(rotate())
		if c := cluster(); c.KeyEpoch != 2 {
			t.Errorf("asked for new keys, epoch %d", c.KeyEpoch)
		}
		report(1, 2)
		spec := webSpec("taken", 0)
		spec.Ports = []weft.PortSpec{{Protocol: weft.UDP, Target: 80, Published: 51820}}
		_, err = m.CreateService(ctx, spec)
		wantErr(t, "port of the encryption", err, weft.ErrConflict, "51820", "the encryption of node")
		encrypts.crash() // a node that is down is not waited for
		other.crash()
		time.Sleep(keyLife + time.Minute)
		if c := cluster(); c.KeyEpoch != 3 {
			t.Errorf("after a day epoch %d", c.KeyEpoch)
		}
		// The nodes' views have what was reported.
		v, _ := m.Store().View().Node(encrypts.id)
		if k := v.Status.Keys; len(k) != 2 || k[1].Epoch != 2 {
			t.Errorf("keys %v", k)
		}
	})
}
