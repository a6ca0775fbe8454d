# scripts/softroce --check: tests what scripts/softroce says of itself. Sourced
# by it.

check() {
    local passed=0 failed=0 skipped=0 folder="$STORE/check.$$" wire
    CHECK_FOLDER="$folder"
    mkdir -p "$folder"

    ok() { passed=$((passed + 1)); echo "ok: $*" >&2; }
    bad() { failed=$((failed + 1)); echo "FAILED: $*" >&2; }
    # trial SECONDS COMMAND...: a boot of its own, with output in $folder.
    trial() {
        LIMIT="$1" COMMAND=("${@:2}")
        boot >"$folder/stdout" 2>"$folder/stderr"
    }

    for wire in lo veth netns; do
        say "the wire $wire"
        WIRE="$wire" BOOT_SECONDS="" LIMIT=240 COMMAND=(wire-check)
        boot 2> >(tee "$folder/stderr" >&2)
        if [ "$CODE" = 0 ]; then
            ok "$wire: ready $BOOT_SECONDS s after power-on"
        elif [ "$wire" = netns ] && [ "$CODE" = 125 ] && grep -q 'knows one network namespace only' "$folder/stderr"; then
            skipped=$((skipped + 1))
            echo "SKIPPED: netns: this kernel's rxe knows one network namespace only; name one of 7.1 or newer with --kernel" >&2
        else
            bad "$wire: exit code $CODE"
        fi
    done
    WIRE=lo

    say "a command's arguments, environment, files, output and exit code"
    printf 'of the host\n' >"$folder/a file"
    CARRIED=("$folder/a file" "renamed=$folder/a file") ENVIRONMENT=("WORDS=two  words" "QUOTES=\"'\$x") OUT_DIR="$folder/out"
    # shellcheck disable=SC2016
    trial 120 bash -c 'echo "$WORDS|$QUOTES|$1|$(cat "/host/a file")" >"$OUT/told"
        cat /host/renamed; echo complaint >/dev/stderr; echo more >&2; echo x 2>/dev/null >/host/written; exit 77' - "an  argument"
    [ "$CODE" = 77 ] && ok "the exit code is 77" || bad "the exit code is $CODE, not 77"
    [ "$(cat "$folder/out/told" 2>&1)" = "two  words|\"'\$x|an  argument|of the host" ] && ok "what it was told came back" ||
        bad "what came back: $(cat "$folder/out/told" 2>&1)"
    [ "$(cat "$folder/stdout")" = "of the host" ] && ok "its stdout" || bad "its stdout was: $(cat "$folder/stdout")"
    [ "$(cat "$folder/stderr")" = $'complaint\nmore' ] && ok "its stderr" || bad "its stderr was: $(cat "$folder/stderr")"
    CARRIED=() ENVIRONMENT=() OUT_DIR=""

    say "a command that does not end"
    trial 15 sleep 600
    [ "$CODE" = 124 ] && grep -q 'stopped after 15 s' "$folder/stderr" && ok "it is stopped in time" || bad "exit code $CODE: $(cat "$folder/stderr")"

    say "a guest that dies"
    trial 120 sh -c 'echo c >/proc/sysrq-trigger; sleep 60'
    [ "$CODE" = 125 ] && grep -q 'the guest died' "$folder/stderr" && ok "it is noticed" || bad "exit code $CODE: $(cat "$folder/stderr")"

    say "what is left behind"
    # Those of runs beside this one are in use.
    local other stale=0
    for other in "$STORE"/runs/*/; do
        if [ -d "$other" ] && flock -n -x "$other" true; then stale=$((stale + 1)); fi
    done
    [ "$stale" = 0 ] && ok "no folder" || bad "$stale folders in .cache/softroce/runs"

    printf '%s passed, %s failed, %s skipped\n' "$passed" "$failed" "$skipped"
    [ "$failed" -eq 0 ]
}
