#!/usr/bin/env bash
# Runs on every spot machine of aws.yaml: asks EC2 every five seconds whether the machine is about to be taken back, which
# is told two minutes before, and then drains its Ray node.
set -uo pipefail

metadata=${EC2_METADATA:-http://169.254.169.254}
here=$(dirname "$(readlink -f "$0")")

while true; do
  # The token of IMDSv2, which aws.yaml requires, lives for a minute and is asked for anew every time.
  token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/latest/api/token")
  # 404 as long as there is no notice.
  if curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action"; then
    echo "spot notice: draining"
    exec "$here/drain-node.sh" 110
  fi
  sleep "${SPOT_POLL_SECONDS:-5}"
done
