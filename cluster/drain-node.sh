#!/usr/bin/env bash
# For a machine that is about to vanish: tell Ray, then wait until its node is empty or the time is up.
#
#     drain-node.sh SECONDS      (with RAY_NODE_ID=... where several nodes run on one machine)
#
# A draining node gets no new work, and Ray Train moves its group before the worker is gone. The node is found, and seen to
# end, by its raylet's command line: `ray drain-node` alone starts a Ray program to learn its own node, and `ray start
# --block` outlives a raylet that ended well, so without the look an idle GPU would be paid for until the time is up.
set -euo pipefail

seconds=${1:?usage: drain-node.sh SECONDS}

node_ids() { grep -ahoz -e '^--node_id=[0-9a-f]\{56\}$' /proc/[0-9]*/cmdline 2> /dev/null | tr '\0' '\n' | cut -d= -f2; }

node_id=${RAY_NODE_ID:-$(node_ids | head -n 1 || true)}
if [[ -z $node_id ]]; then
  echo "drain-node: no Ray node runs here" >&2
  exit 0
fi
ray drain-node --node-id "$node_id" --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message "the machine is about to vanish" --deadline-remaining-seconds "$seconds"
while ((SECONDS < seconds)) && [[ $(node_ids) == *"$node_id"* ]]; do
  sleep 1
done
