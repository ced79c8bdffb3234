#!/usr/bin/env bash
# Sees to it that the named commands are there: installs what is missing where
# that is allowed (root, or sudo without a password, on Debian and its kin),
# else prints the exact command and fails.
set -euo pipefail

package_of() {
  case $1 in
    cc | c++) echo build-essential ;;
    aria2c) echo aria2 ;;
    *) echo "$1" ;;
  esac
}

packages=()
for tool in "$@"; do
  command -v "$tool" >/dev/null || packages+=("$(package_of "$tool")")
done
if ! command -v cargo >/dev/null; then
  echo "Rust is missing: see https://rustup.rs (or install rustup by your package manager)" >&2
  exit 1
fi
((${#packages[@]})) || exit 0

install="apt-get install -y --no-install-recommends ${packages[*]}"
if ! command -v apt-get >/dev/null; then
  echo "please install these (Debian's names): ${packages[*]}" >&2
  exit 1
fi
if [[ $(id -u) == 0 ]]; then
  as_root=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root=(sudo -n)
else
  echo "missing: ${packages[*]}; please run:" >&2
  echo "  sudo apt-get update && sudo $install" >&2
  exit 1
fi
echo "installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -q </dev/null
# Word splitting is wanted: the command is also what we print above.
# shellcheck disable=SC2086
"${as_root[@]}" $install </dev/null
