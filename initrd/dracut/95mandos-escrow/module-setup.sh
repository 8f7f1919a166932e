#!/bin/bash
# Puts the boot program and this machine's boot identity into the image, whether
# it is made for this host only or not: the identity is one machine's anyway.
# dracut.modules(7) has the rules. Modules are installed in the order of their
# numbers: crypt comes before, because in an image for this host only it writes
# the crypttab that is added to anew.

config=/etc/mandos-escrow
program=/usr/lib/mandos-escrow/mandos-escrow-unlock

check() {
    [[ -e $dracutsysrootdir$config/unlock.conf ]] || return 1
    require_binaries "$program" || return 1
    if [[ ! -x $dracutsysrootdir$systemdutildir/systemd-cryptsetup ]]; then
        derror "mandos-escrow: needs systemd-cryptsetup in the image: its questions are the ones that are answered"
        return 1
    fi
    return 0
}

depends() {
    echo crypt systemd
    return 0
}

# What each network hook prints when it is asked for files or modules.
hooks_say() {
    local dir=$dracutsysrootdir$config/network-hooks.d hook
    for hook in "$dir"/*; do
        [[ -f $hook && -x $hook && ! ${hook##*/} =~ [^A-Za-z0-9_.-] ]] || continue
        MANDOSNETHOOKDIR=$dir MODE=$1 DEVICE='' VERBOSITY=0 "$hook" "$1" < /dev/null || dwarn "mandos-escrow: $hook $1 failed"
    done
}

# In an image for this host only, the drivers of the cards that it has; where it
# shows none, as in a chroot without /sys, all of them.
installkernel() {
    local driver found=
    hostonly='' instmods af_packet ipv6 8021q bridge bonding
    for driver in $(hooks_say modules); do
        hostonly='' instmods "$driver"
    done
    if [[ $hostonly ]]; then
        for driver in /sys/class/net/*/device/driver/module; do
            [[ -e $driver ]] || continue
            found=yes
            hostonly='' instmods "$(basename "$(readlink -f "$driver")")"
        done
    fi
    [[ $found ]] || hostonly='' instmods '=drivers/net'
}

# The UUID of a volume as crypttab names it.
uuid_of() {
    case $1 in
        UUID=*) echo "${1#UUID=}" ;;
        *=*) blkid -l -t "$1" -s UUID -o value ;;
        *) blkid -s UUID -o value -- "$1" ;;
    esac
}

# Whether the image's crypttab has a mapping of that name.
listed() {
    local name rest
    [[ -e $initdir/etc/crypttab ]] || return 1
    while read -r name rest || [[ $name ]]; do
        [[ $name == "$1" ]] && return 0
    done < "$initdir/etc/crypttab"
    return 1
}

# Enrolled volumes are opened in the image, where their questions are answered,
# also those that dracut leaves to the running system.
add_volumes() {
    local name source key options uuid
    while read -r name source key options || [[ $name ]]; do
        [[ $name && $name != \#* ]] || continue
        [[ ,$options, =~ ,(noauto|nofail|plain|swap|tmp|keyscript=[^,]*|header=[^,]*), ]] && continue
        [[ ! $key || $key == none || $key == - ]] || continue
        uuid=$(uuid_of "$source") && [[ $uuid ]] || continue
        grep -Fxq "volume-uuid: $uuid" "$dracutsysrootdir$config/unlock.conf" || continue
        listed "$name" && continue
        echo "$name UUID=$uuid none ${options:-luks}" >> "$initdir/etc/crypttab"
    done < "$dracutsysrootdir/etc/crypttab"
    mark_hostonly /etc/crypttab
}

install() {
    inst_simple "$program"
    # The same modes as in /etc, whatever the umask is. A link is kept as one, so
    # nothing outside of the folder gets into the image by it.
    mkdir -p "$initdir/etc"
    cp -a "$dracutsysrootdir$config" "$initdir/etc/"
    # The network hooks themselves are in that folder.
    local file
    for file in $(hooks_say files); do
        inst "$file" || dwarn "mandos-escrow: a network hook needs $file, which is missing"
    done
    [[ -e $dracutsysrootdir/etc/crypttab ]] && add_volumes

    inst_simple "$moddir/mandos-escrow-unlock.service" "$systemdsystemunitdir/mandos-escrow-unlock.service"
    inst_simple "$moddir/mandos-escrow-check.service" "$systemdsystemunitdir/mandos-escrow-check.service"
    $SYSTEMCTL -q --root "$initdir" add-wants cryptsetup.target mandos-escrow-unlock.service
    # What was opened is compared before it is mounted, or it is not mounted.
    # A link by hand: systemctl adds none to a unit that a generator makes at boot.
    mkdir -p "$initdir/etc/systemd/system/sysroot.mount.requires"
    ln -sfn "$systemdsystemunitdir/mandos-escrow-check.service" "$initdir/etc/systemd/system/sysroot.mount.requires/mandos-escrow-check.service"
}
