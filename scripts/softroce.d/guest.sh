# Makes the guest of scripts/softroce, which sources this: a kernel and an
# initramfs out of Debian's packages. They are fetched and unpacked under
# $STORE, never installed; apt works on lists and a cache of its own there, so
# that no root is needed and the host's apt is left alone.

# What the guest is made of; apt adds what these depend on.
GUEST_PACKAGES=(bash busybox-static kmod iproute2 iputils-ping ibverbs-utils ibverbs-providers rdmacm-utils perftest
    libgcc-s1 libstdc++6)
# What of it goes in, as patterns of file names; busybox is the rest of the user space.
GUEST_PROGRAMS=(bash kmod ip ss tc bridge rdma ping 'ibv_*' 'ib_write_*' 'ib_read_*' 'ib_send_*' 'ib_atomic_*' rping ucmatose)
# Beside the libraries that the programs name: what a Rust or C++ program links to.
GUEST_LIBRARIES=(libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1 libutil.so.1 libresolv.so.2 libgcc_s.so.1
    libstdc++.so.6 libibverbs.so.1 librdmacm.so.1)
# Loaded at boot, each after what it depends on.
GUEST_MODULES=(virtio_pci virtio_console 9pnet_virtio 9p dummy veth sch_netem ib_core ib_uverbs rdma_cm rdma_ucm rdma_rxe)
# Not every kernel has these apart, or needs them: rxe's checksum is found by name
# when a device is made, which depmod does not see.
GUEST_MODULES_IF_ANY=(crc32_generic crc32_pclmul crc32c_generic crc32c_intel)

# apt TOOL ARGUMENTS...: on lists, a cache and a (void) list of installed packages of our own.
apt_apart() {
    local tool="$1" at="$STORE/apt"
    shift
    mkdir -p "$at/state/lists/partial" "$at/cache/archives/partial"
    [ -e "$at/status" ] || : >"$at/status"
    # The sandbox user could not read a checkout in somebody's home.
    "$tool" -q -o Dir::State="$at/state" -o Dir::State::status="$at/status" -o Dir::Cache="$at/cache" \
        -o Dir::Log="$at" -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Retries=3 \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false "$@"
}

# Kernels for whole machines that apt offers, newest first; the cloud and
# real-time builds are others, and two numbers are a package without a kernel.
kernels_offered() {
    apt_apart apt-cache search --names-only '^linux-image-[0-9]+[.][0-9]+[.].*-amd64$' | sed 's/ .*//' |
        grep -v -e -cloud- -e -rt- | sort -rV
}

# Which of them to take, best first. In 6.1 rxe's work is done in softirqs; in
# newer ones by workqueues, for which a process that polls leaves no time: 64
# bytes take 50 us to 100 us there and 1 ms to 7 ms here.
kernels_wanted() { awk '/-6[.]1[.]/ {print; next} {later[++n] = $0} END {for (i = 1; i <= n; i++) print later[i]}'; }

# The first whose rxe knows network namespaces, if there is any.
kernel_for_namespaces() { grep -m1 -E '^linux-image-(7[.][1-9]|7[.][1-9][0-9]|[89][.]|[1-9][0-9])' || true; }

# has_rxe DEB...
# (Not grep -q: dpkg-deb would complain of a pipe that closes early.)
has_rxe() {
    local deb
    for deb in "$@"; do
        if dpkg-deb --fsys-tarfile "$deb" | tar -t | grep '/rdma_rxe\.ko' >/dev/null; then return 0; fi
    done
    return 1
}

# Asks apt and downloads $STORE/debs: user/ is the user space, kernel/ the usual
# kernel, kernel-netns/ one for namespaces if apt has it.
guest_fetch() {
    local name log="$STORE/apt.log" into="$STORE/debs.part"
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        die "the guest is made of Debian's packages, and there is no apt-get and dpkg-deb here: run this on Debian or Ubuntu"
    say "softroce: Debian's packages for the guest (about 100 MiB, kept in .cache/softroce)"
    apt_apart apt-get update >"$log" 2>&1 || { cat "$log" >&2; die "apt-get update failed: see above; is the Debian mirror reachable?"; }
    rm -rf "$into"
    mkdir -p "$into/user" "$into/kernel" "$into/kernel-netns"
    # fetch_kernel NAME FOLDER: newer ones are in several packages.
    fetch_kernel() {
        local names=("$1") part
        rm -f "$2"/*.deb
        for part in base binary modules; do
            if apt_apart apt-cache show "$1" | grep "^Depends:.*linux-$part-" >/dev/null; then names+=("${1/image/$part}"); fi
        done
        (cd "$2" && apt_apart apt-get download "${names[@]}") >"$log" 2>&1 ||
            { cat "$log" >&2; die "${names[*]} could not be downloaded: see above"; }
        has_rxe "$2"/*.deb || { echo "$1 has no rdma_rxe" >&2; return 1; }
    }
    kernels_offered >"$STORE/kernels"
    for name in $(kernels_wanted <"$STORE/kernels" | head -n 3) ""; do
        [ -n "$name" ] || die "apt offers no linux-image-*-amd64 with rdma_rxe"
        if fetch_kernel "$name" "$into/kernel"; then break; fi
    done
    name="$(kernel_for_namespaces <"$STORE/kernels")"
    if [ -n "$name" ]; then fetch_kernel "$name" "$into/kernel-netns" || rm -f "$into"/kernel-netns/*.deb; fi
    # With nothing installed, apt names all that the packages need.
    apt_apart apt-get clean
    apt_apart apt-get install --download-only --no-install-recommends -y "${GUEST_PACKAGES[@]}" >"$log" 2>&1 ||
        { cat "$log" >&2; die "the guest's packages could not be downloaded: see above"; }
    mv "$STORE"/apt/cache/archives/*.deb "$into/user/"
    rm -rf "$STORE/debs"
    mv "$into" "$STORE/debs"
}

# What the guest is made of: the kernel, which is --kernel's, or one for
# namespaces if the wire wants it and apt had one, or the usual one; and the rest.
guest_parts() {
    local kernel=("${KERNEL[@]}")
    if [ "${#kernel[@]}" -eq 0 ] && [ "$WIRE" = netns ]; then kernel=("$STORE"/debs/kernel-netns/*.deb); fi
    if [ "${#kernel[@]}" -eq 0 ] || [ ! -e "${kernel[0]}" ]; then kernel=("$STORE"/debs/kernel/*.deb); fi
    printf '%s\n' "${kernel[@]}" "$STORE"/debs/user/*.deb
}

# That and what makes it, as a name. Packages carry their versions in their names.
guest_key() {
    { guest_parts | sed 's|.*/||'; cat "$PARTS/guest.sh" "$PARTS/init"; } | sha256sum | head -c 16
}

# uncompressed BZIMAGE: the ELF kernel within, to stdout. The guest's own
# decompression takes seconds under emulation.
uncompressed() {
    local setup offset length magic
    # Linux' boot protocol: sectors of set-up code, then the payload's place and length.
    setup="$(od -An -tu1 -j $((0x1f1)) -N 1 "$1")"
    read -r offset length < <(od -An -tu4 -j $((0x248)) -N 8 "$1")
    [ "$setup" -ne 0 ] || setup=4
    offset=$(((setup + 1) * 512 + offset))
    magic="$(od -An -tx1 -j "$offset" -N 4 "$1" | tr -d ' ')"
    payload() { dd if="$1" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count="$2" status=none; }
    # xz and zstd payloads are followed by their size, four bytes.
    case "$magic" in
        fd377a58) payload "$1" $((length - 4)) | xz -dc ;;
        28b52ffd) payload "$1" $((length - 4)) | zstd -qdc ;;
        1f8b*) payload "$1" "$length" | gzip -dc ;;
        *) die "the kernel's compression ($magic) is not known here" ;;
    esac
}

# Builds $STORE/guest-KEY: kernel, initramfs, libraries (names), release.
guest_build() {
    local into="$1" work root tree kernel="" release file name module base loader libs
    say "softroce: building the guest (once)"
    work="$(mktemp -d "$STORE/build.XXXXXX")"
    BUILDING="$work"
    root="$work/root" tree="$work/tree"
    mkdir -p "$root" "$work/guest"
    guest_parts | while read -r file; do dpkg-deb -x "$file" "$root"; done

    # The kernel.
    for file in "$root"/boot/vmlinuz-* "$root"/usr/lib/modules/*/vmlinuz; do [ ! -f "$file" ] || kernel="$file"; done
    [ -n "$kernel" ] || die "the kernel's packages brought no vmlinuz"
    for file in "$root"/lib/modules/*/kernel "$root"/usr/lib/modules/*/kernel; do [ ! -d "$file" ] || release="$(basename "$(dirname "$file")")"; done
    uncompressed "$kernel" >"$work/guest/kernel"
    [ "$(head -c 4 "$work/guest/kernel" | od -An -c | tr -d ' ')" = '177ELF' ] || die "no ELF kernel came out of $kernel"
    printf '%s\n' "$release" >"$work/guest/release"

    mkdir -p "$tree"/{bin,lib64,usr/lib/x86_64-linux-gnu/libibverbs,etc/libibverbs.d,proc,sys,dev,tmp,run,root,host,out,modules,var}
    ln -s bin "$tree/sbin"
    ln -s ../bin "$tree/usr/bin"
    ln -s ../bin "$tree/usr/sbin"
    ln -s ../run "$tree/var/run"

    # The user space. The packages' own loader resolves their own libraries.
    libs="$root/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu"
    loader="$(readlink -f "$root/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" || true)"
    [ -x "$loader" ] || loader="$root/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    [ -x "$loader" ] || die "libc6 brought no loader"
    cp -L "$loader" "$tree/lib64/ld-linux-x86-64.so.2"
    guest_library() { [ -e "$tree/usr/lib/$(basename "$1")" ] || cp -L "$1" "$tree/usr/lib/"; }
    guest_libraries_of() {
        local library
        "$loader" --library-path "$libs" --list "$1" | awk '/=> \//{print $3}' | while read -r library; do
            case "$library" in *ld-linux*) ;; *) guest_library "$library" ;; esac
        done
    }
    for name in "${GUEST_PROGRAMS[@]}"; do
        # shellcheck disable=SC2231
        for file in "$root"/{bin,sbin,usr/bin,usr/sbin}/$name; do
            if [ ! -x "$file" ]; then continue; fi
            cp -L "$file" "$tree/bin/"
            guest_libraries_of "$file"
        done
    done
    for name in bash kmod ip tc rdma ping ibv_devinfo ib_write_lat ib_write_bw; do
        [ -x "$tree/bin/$name" ] || die "no package brought $name"
    done
    ln -sf bash "$tree/bin/sh"
    for name in "${GUEST_LIBRARIES[@]}"; do
        for file in "$root"/lib/x86_64-linux-gnu/"$name" "$root"/usr/lib/x86_64-linux-gnu/"$name"; do
            if [ -e "$file" ]; then guest_library "$file"; guest_libraries_of "$file"; fi
        done
    done
    for file in "$root"/usr/lib/x86_64-linux-gnu/libibverbs/librxe-*.so; do
        cp -L "$file" "$tree/usr/lib/x86_64-linux-gnu/libibverbs/"
        guest_libraries_of "$file"
    done
    cp "$root/etc/libibverbs.d/rxe.driver" "$tree/etc/libibverbs.d/"
    for file in "$root"/{bin,usr/bin}/busybox; do if [ -e "$file" ]; then cp "$file" "$tree/bin/busybox"; fi; done
    # Not over a program that is there already.
    for name in $("$tree/bin/busybox" --list); do [ -e "$tree/bin/$name" ] || ln -s busybox "$tree/bin/$name"; done
    ls "$tree/usr/lib" >"$work/guest/libraries"

    # The modules, in the order of loading.
    base="$root"
    [ -d "$base/lib/modules/$release" ] || base="$root/usr"
    guest_kmod() { "$loader" --library-path "$libs" --argv0 "$1" "$tree/bin/kmod" "${@:2}"; }
    guest_kmod depmod -b "$base" "$release" 2>/dev/null || true
    for module in "${GUEST_MODULES[@]}" "${GUEST_MODULES_IF_ANY[@]}"; do
        if ! guest_kmod modprobe -d "$base" -S "$release" --show-depends "$module" >"$work/depends" 2>"$work/depends.err"; then
            case " ${GUEST_MODULES_IF_ANY[*]} " in *" $module "*) continue ;; esac
            cat "$work/depends.err" >&2
            die "Linux $release has no module $module"
        fi
        awk '$1 == "insmod" {print $2}' "$work/depends" >>"$work/order"
    done
    awk '!seen[$0]++' "$work/order" | while read -r file; do
        name="$(basename "$file")"
        name="${name%%.ko*}.ko"
        case "$file" in
            *.xz) xz -dc "$file" >"$tree/modules/$name" ;;
            *.zst) zstd -qdc "$file" >"$tree/modules/$name" ;;
            *) cp "$file" "$tree/modules/$name" ;;
        esac
        printf '%s\n' "$name" >>"$tree/modules/order"
    done

    printf 'root:x:0:0:root:/root:/bin/sh\n' >"$tree/etc/passwd"
    printf 'root:x:0:\n' >"$tree/etc/group"
    printf '127.0.0.1 localhost\n::1 localhost\n' >"$tree/etc/hosts"
    install -m 755 "$PARTS/init" "$tree/init"
    (cd "$tree" && find . | LC_ALL=C sort | "$tree/bin/busybox" cpio -o -H newc 2>/dev/null) >"$work/guest/initramfs"
    : >"$work/guest/in-use"
    mv -T "$work/guest" "$into"
    rm -rf "$work"
    BUILDING=""
}

# Sets GUEST to a guest that is ready, and holds it (shared lock on descriptor
# 5) against the clearing below. One at a time fetches and builds.
guest_ready() {
    mkdir -p "$STORE"
    exec 6>"$STORE/lock"
    flock -n 6 || { echo "another run is building the guest; waiting for it" >&2; flock 6; }
    # Of a build that was killed.
    rm -rf "$STORE"/build.*
    if [ "$REFRESH" = 1 ] || [ ! -d "$STORE/debs" ]; then guest_fetch; REFRESH=0; fi
    if [ ! -d "$STORE/guest-$(guest_key)" ]; then
        if [ "${#KERNEL[@]}" -gt 0 ] && ! has_rxe "${KERNEL[@]}"; then
            die "there is no module rdma_rxe in ${KERNEL[*]}; a newer kernel is in several packages (linux-base-*, linux-binary-*, linux-modules-*): name each with --kernel"
        fi
        guest_build "$STORE/guest-$(guest_key)"
    fi
    GUEST="$STORE/guest-$(guest_key)"
    touch "$GUEST/in-use"
    exec 5<"$GUEST/in-use"
    flock -s 5
    # Others that nobody has used for a week.
    find "$STORE" -maxdepth 2 -path "$STORE/guest-*/in-use" -mtime +7 | while read -r old; do
        if flock -n -x "$old" true; then rm -rf "$(dirname "$old")"; fi
    done
    exec 6>&-
}
