# A Ray cluster inside an allocation, the command on its first node, and the way back. Above this line: job, folder,
# python, command, inside (apptainer, or env), step_options (of Pyxis), num_nodes, decode_nodes, cpus, decode_cpus, sizes,
# decode_sizes, symmetric, start_timeout_s, retries, unfinished, no_package, the environment. Head and workers are ended as
# steps: but for symmetric-run, nothing here calls `ray stop`, which would end the user's other clusters on a shared node.
set -euo pipefail
umask 077
export SLURM_EXPORT_ENV=ALL
suffix=${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
tmp=/tmp/mr-$SLURM_JOB_ID # short: the path of a socket has 107 bytes
token=$folder/token-$SLURM_JOB_ID
entry=$folder/entry-$SLURM_JOB_ID
restarts=${SLURM_RESTART_COUNT:-0}
steps=() all=() first=()
if ((decode_nodes)); then all=(--het-group=0,1) first=(--het-group=0); fi
driver="" asked="" rc=1

fail() {
    echo "medim-ray: $*" >&2
    exit 1
}

finish() {
    rc=$?
    trap - EXIT
    trap '' TERM USR1
    if ((${#steps[@]})); then echo "medim-ray: exit code $rc; srun tells below that the steps of the cluster are ended"; fi
    for step in "${steps[@]}"; do kill "$step" 2>/dev/null || true; done
    wait "${steps[@]}" 2>/dev/null || true
    rm -f "$token" "$entry"
    srun "${all[@]}" --overlap rm -rf "$tmp" 2>/dev/null || true
    if [[ $asked == USR1 && $rc == 138 ]]; then rc=$unfinished; fi # 138: ended by the signal itself
    if ((rc == unfinished)) && [[ ! -e $folder/stopped ]]; then
        if ((restarts < retries)); then
            echo "medim-ray: unfinished, back into the queue ($((restarts + 1)) of $retries)"
            scontrol requeue "$SLURM_JOB_ID" && exit 0
        fi
        echo "medim-ray: unfinished, and no retry is left (retries=$retries)" >&2
    fi
    echo "$rc" >"$folder/exit_code$suffix"
    exit "$rc"
}

on_signal() {
    asked=$1
    if [[ -n $driver ]]; then
        kill "-$1" "$driver" 2>/dev/null || true
    elif [[ -e $entry ]]; then
        kill "-$1" "$(cat "$entry")" 2>/dev/null || true
    fi
}

# The address by which Slurm itself reaches a node.
address_of() {
    local host
    host=$(scontrol show node "$1" --oneliner | sed -E 's/.* NodeAddr=([^ ]+).*/\1/')
    getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }'
}

check_node() {
    test -r "$token" || {
        echo "medim-ray: node $SLURMD_NODENAME does not see $token" >&2
        exit 1
    }
    "${inside[@]}" "$python" -c 'import medim_ray.cli, ray' || {
        echo "medim-ray: node $SLURMD_NODENAME: ${inside[*]} $python has no medim_ray; see environment.*" >&2
        exit "$no_package"
    }
}

start_head() {
    exec "${start[@]}" --head --node-ip-address="$head_ip" --port="$port" --ray-client-server-port=$((port + 1)) \
        --include-dashboard=false "$@"
}

start_worker() {
    exec "${start[@]}" --address="$RAY_ADDRESS" "$@" # its own address: the one with a route to the head
}

# Functions and arrays do not pass into a step by themselves.
step() {
    local where=("${@:1:$#-1}") code="${*: -1}"
    srun "${where[@]}" "${step_options[@]}" --overlap bash -c "$(declare -f \
        check_node start_head start_worker)
        $(declare -p inside start sizes decode_sizes token python no_package head_ip port); $code"
}

# The exit code of a child as rc: a signal that this script takes ends `wait`, not the child.
await() {
    while
        rc=0
        wait "$1" || rc=$?
        kill -0 "$1" 2>/dev/null
    do :; done
}

rm -f "$folder/exit_code$suffix"
trap finish EXIT
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM
echo "medim-ray: $job is job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((restarts + 1))"

# The token is a file that the nodes read: nothing secret stands in a command line or in Slurm's records.
head -c 32 /dev/urandom | base64 -w 0 >"$token"
# A drain of 30 s before nodes end is for servers; here the command has ended by then.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

# One of a thousand blocks of ports by the job's number, and from there on the first that is free.
head_ip=$(address_of "$SLURMD_NODENAME")
port=$((20000 + SLURM_JOB_ID % 1000 * 10))
while (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null; do port=$((port + 2)); done
export RAY_ADDRESS=$head_ip:$port RAY_TMPDIR=$tmp
run=("${inside[@]}")
if ((${#step_options[@]})); then
    run=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${step_options[@]}")
fi
start=("${inside[@]}" "$python" -m ray.scripts.scripts start --block "--temp-dir=$tmp" --disable-usage-stats
    --dashboard-agent-listen-port=0 --metrics-export-port=0 --min-worker-port=0 --max-worker-port=0)

step "${all[@]}" --cpus-per-task=1 check_node || {
    rc=$?
    ((rc == no_package)) && exit "$rc"
    fail "storage.root is not shared by all nodes: give a folder of the cluster's shared filesystem"
}
if ((symmetric)); then
    # It runs the command on the head by itself, and says nothing by its exit code when the head did not start.
    PATH=$(dirname "$python"):$PATH RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=$start_timeout_s \
        srun "${step_options[@]}" --overlap --cpus-per-task="$cpus" "${inside[@]}" \
        "$python" -m ray.scripts.scripts symmetric-run --address "$RAY_ADDRESS" --min-nodes "$num_nodes" "${sizes[@]}" -- \
        bash -c 'echo $$ >"$0"; exec "$@"' "$entry" "${command[@]}" &
    await $!
    [[ -e $entry ]] || fail "the head did not start, see above"
    exit "$rc"
fi
step "${first[@]}" --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --nodelist="$SLURMD_NODENAME" \
    'start_head "${sizes[@]}"' &
steps+=($!)
deadline=$((SECONDS + start_timeout_s))
until (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null; do
    kill -0 "${steps[0]}" 2>/dev/null || fail "the head did not start, see above"
    ((SECONDS < deadline)) || fail "the head did not answer in $start_timeout_s s (slurm.start_timeout_s)"
    sleep 0.5
done
if ((num_nodes - decode_nodes > 1)); then
    others=$((num_nodes - decode_nodes - 1))
    step "${first[@]}" --nodes="$others" --ntasks="$others" --cpus-per-task="$cpus" --exclude="$SLURMD_NODENAME" \
        'start_worker "${sizes[@]}"' &
    steps+=($!)
fi
if ((decode_nodes)); then
    step --het-group=1 --nodes="$decode_nodes" --ntasks="$decode_nodes" --cpus-per-task="$decode_cpus" \
        'start_worker "${decode_sizes[@]}"' &
    steps+=($!)
fi
"${run[@]}" "$python" -m medim_ray.submit.wait_nodes "$num_nodes" "$start_timeout_s" "${steps[@]}" ||
    fail "not all of $num_nodes nodes came up"
[[ -z $asked ]] || fail "the time limit came before the command began: give a longer time_limit_s"
"${run[@]}" "${command[@]}" &
driver=$!
await "$driver"
exit "$rc"
