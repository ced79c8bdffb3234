#!/usr/bin/env bash
# Makes a container image of the binaries in DIR and the libraries that they
# are linked with, and nothing else: no base image, so no registry is asked.
#
#   scripts/image.sh DIR [IMAGE]      (default pingora-slice:local)
set -euo pipefail
dir=$1
image=${2:-pingora-slice:local}
user=10001

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{usr/local/bin,etc/ssl/certs,etc/pingora-slice/{tls,nodes/{1,2,3}},tmp}
mkdir -p "$root"/var/{cache,lib}/pingora-slice

for binary in pingora-slice pingora-slicectl; do
  cp "$dir/$binary" "$root/usr/local/bin/"
  # Most of a binary is debug information.
  if command -v strip >/dev/null; then strip "$root/usr/local/bin/$binary"; fi
  # Lines are `name => /path (address)` or `/path (address)`.
  { ldd "$dir/$binary" || true; } | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$root$(dirname "$library")"
    cp -L "$library" "$root$library"
  done
done
# For names of other nodes, and for origins with https.
printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"
printf 'pingora-slice:x:%s:%s::/:/\n' $user $user >"$root/etc/passwd"
if [[ -e /etc/ssl/certs/ca-certificates.crt ]]; then
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
fi

# New volumes take the owner of the folder they are laid over.
tar -C "$root" --numeric-owner --owner=$user --group=$user -c . |
  docker import \
    --change "USER $user:$user" \
    --change 'WORKDIR /etc/pingora-slice' \
    --change 'EXPOSE 8080/tcp 9090/tcp 9091/tcp 7001/udp 7002/udp' \
    --change 'ENTRYPOINT ["/usr/local/bin/pingora-slice"]' \
    - "$image" >/dev/null
echo "image $image: $(docker image inspect --format '{{.Size}}' "$image") bytes"
