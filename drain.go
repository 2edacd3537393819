package weft

import "time"

// DrainTime is how long a task that an update or a smaller number of replicas
// takes away goes on serving the connections it has, at most; new ones do not
// reach it by then. 0 = it is stopped at once. It is LabelDrain's.
func (s *ServiceSpec) DrainTime() time.Duration {
	d, err := time.ParseDuration(s.Labels[LabelDrain])
	if err != nil || checkDrain(s.Labels[LabelDrain]) != nil {
		return 0 // none is set; Validate refuses what is wrong
	}
	return d
}
