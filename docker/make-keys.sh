#!/bin/sh
# Makes what compose.yaml's cloud and edge show each other; run again, it renews the certificates and keeps CA and token.
#   make-keys.sh CA_FOLDER CLOUD_FOLDER EDGE_FOLDER NAME...   (the names by which edges call the cloud)
set -eu
ca=$1 cloud=$2 edge=$3
shift 3
names=
for name in "$@"; do names="$names --name $name"; done
# shellcheck disable=SC2086  # one word each
privatelora-cloud cert dev --out "$ca" $names --client edge
cp "$ca/ca.pem" "$ca/server.key" "$ca/server.pem" "$cloud"
cp "$ca/ca.pem" "$ca/edge.key" "$ca/edge.pem" "$edge"
test -e "$edge/token" || privatelora-cloud token add edge --tokens "$cloud/tokens.json" --out "$edge/token"
