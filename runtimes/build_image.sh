#!/usr/bin/env bash
# Builds an image without a Docker daemon, and if need be without a container registry, by buildah.
#
#     runtimes/build_image.sh server                         -> actionclip-serve
#     SUITE=noble runtimes/build_image.sh onnxruntime        on a base made of packages of Ubuntu 24.04
#     runtimes/build_image.sh onnxruntime/Dockerfile.gpu BUILDAH OPTION...
#
# SUITE makes the base with mmdebstrap, where no registry can be reached: `noble` has the Python 3.12 that
# the images name, `trixie` has 3.13. It stands in for python:3.12-slim and no other base.
# Any user can run it who has ranges in /etc/subuid and /etc/subgid. Inside a container, set
# STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot. Behind a proxy that has certificates of its own, add
#     --volume /etc/ssl/certs:/etc/ssl/certs:ro --volume /etc/pip.conf:/etc/pip.conf:ro
# with `cert = /etc/ssl/certs/ca-certificates.crt` in pip.conf; neither becomes part of the image.
set -euo pipefail
cd "$(dirname "$0")/.."

file=runtimes/${1:?is missing: a folder of runtimes, such as server}
shift
[ -d "$file" ] && file=$file/Dockerfile
if [ ! -f "$file" ]; then
    echo "error: ${file%/Dockerfile} has no Dockerfile; give one of" runtimes/*/Dockerfile* >&2
    exit 1
fi
image=$(sed -n 's/^# *docker build -f .* -t \([^ ]*\) \.$/\1/p' "$file")
SUITE=${SUITE:-}

# What python:3.12-slim has: a `python` and `pip` of their own in /usr/local, certificates, UTF-8, and no manuals.
make_base() {
    local container components=main
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    case $SUITE in noble) components="main universe" ;; esac
    mmdebstrap --variant=apt --include=passwd,python3-venv,ca-certificates --components="$components" \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --customize-hook='chroot "$1" python3 -m venv /usr/local' "$SUITE" "$work/base.tar"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/base.tar" /
    buildah config --env LANG=C.UTF-8 --cmd python3 \
        --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah commit --quiet --rm "$container" "$1"
}

base=()
if [ -n "$SUITE" ]; then
    name=localhost/actionclip-base:$SUITE
    buildah inspect --type image "$name" >/dev/null 2>&1 || make_base "$name"
    base=(--build-arg "BASE=$name")
fi
# The format of OCI, which is buildah's own, has no place for HEALTHCHECK.
buildah bud --format docker --file "$file" --tag "$image" ${base[@]+"${base[@]}"} "$@" .
