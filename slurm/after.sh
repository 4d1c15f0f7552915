# What follows the processes: start again under the same id where that helps, and note what was decided.
# Needs from the lines above: run, max_requeues, max_restarts. Lines of launches.jsonl: slurm/record.py.
status=$?
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}}
job=${job:-$SLURM_JOB_ID}
attempt=${SLURM_RESTART_COUNT:-0}
step=$(cat "$run/checkpoints/last" 2> /dev/null || echo none)
count() { # how many lines of this job say it
    cat "$run"/launches*.jsonl 2> /dev/null | grep -c "^{\"event\": \"$1\", \"job\": \"$job\"$2"
}
note() {
    printf '{"event": "%s", "job": "%s", "attempt": %d, "time": %s, "status": %d, %s}\n' \
        "$1" "$job" "$attempt" "$(date +%s.%3N)" "$status" "$2" >> "$run/launches.jsonl"
}
this=", \"attempt\": $attempt,"
# 128 plus a signal; by HUP, INT, USR1, USR2 and TERM (utils/signals.py) a process is told to leave.
was_killed=no told=$(count stopped "$this")
case $status in
    129 | 130 | 143) ;;
    138 | 140) told=1 ;; # USR1 and USR2 may come before the processes can note that they were told
    1[3-9]?) was_killed=yes ;;
esac
if [ "$status" -eq 0 ]; then
    kind=finished
elif [ "$(count failed "$this")" -gt 0 ]; then
    # The others were told to end because one rank failed: what they say does not count.
    kind=failed status=1
elif [ "$was_killed" = no ] && [ "$told" -gt 0 ]; then
    kind=stopped spent=$(count again ".*\"kind\": \"stopped\"") most=$max_requeues
    [ "$(count stopped "$this.*SIGINT")" -gt 0 ] && kind=interrupted
elif [ "$status" -gt 128 ] || [ "$(count began "$this")" -gt 0 ]; then
    kind=killed spent=$(count again ".*\"kind\": \"killed\", \"step\": \"$step\"") most=$max_restarts
else
    kind=unstarted
fi
case $kind in stopped | killed)
    # A job that was cancelled, requeued by others or met its time limit is no longer RUNNING.
    case $(scontrol show job --oneliner "$SLURM_JOB_ID" 2> /dev/null) in *" JobState=RUNNING "*)
        if [ "$spent" -lt "$most" ]; then
            echo "job $job: $kind (status $status); it starts again from checkpoint $step"
            # What cannot be noted is not counted, so it would start again without end.
            note again "\"kind\": \"$kind\", \"step\": \"$step\"" \
                && scontrol requeue "$SLURM_JOB_ID" && exit "$status"
            kind=refused
            echo "error: job $job: noting that or Slurm's requeue failed: it is given up at checkpoint $step"
        else
            echo "error: job $job: $kind (status $status) after $spent restarts: it is given up at checkpoint $step"
        fi
        ;;
    esac
    ;;
esac
[ "$kind" = finished ] || note final "\"kind\": \"$kind\", \"step\": \"$step\""
exit "$status"
