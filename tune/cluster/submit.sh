#!/usr/bin/env bash
# Submits a sweep to a running Ray cluster as a job: the driver runs on the head and outlives this shell.
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: submit.sh FOLDER OPTION…

  FOLDER   travels to the cluster and is the job's working folder: sweep.yaml and the split file, not the data
  OPTION   of `osml tune`; the paths of data and results are the cluster's

Environment:
  MLFLOW_TRACKING_URI     the tracking server, as all machines of the cluster reach it (needed)
  RAY_API_SERVER_ADDRESS  the cluster's dashboard (default http://127.0.0.1:8265, the end of `ray dashboard`'s tunnel)
  RAY_AUTH_MODE           token (default) or disabled; the token is in ~/.ray/auth_token or RAY_AUTH_TOKEN

Example:
  MLFLOW_TRACKING_URI=http://mlflow.internal:5000 submit.sh my-sweep --data /shared/photos -c sweep.yaml \
      --out /shared/sweeps/first --register photos

The job goes on when this is interrupted: `ray job list`, `ray job logs -f ID`, `ray job stop ID`.
USAGE
}

fail() {
    echo "submit.sh: $1" >&2
    exit 2
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "" | -*) usage >&2; exit 2 ;;
esac
folder=$1
shift
[[ -d $folder ]] || fail "'$folder' is no folder; name the one that holds sweep.yaml"
[[ -n ${MLFLOW_TRACKING_URI:-} ]] || fail "MLFLOW_TRACKING_URI is not set; name a server that all machines reach"
command -v ray >/dev/null || fail "'ray' is not installed here; pip install 'ray[default]', in the cluster's version"

export MLFLOW_TRACKING_URI RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
# Only the address: a job's environment is shown in the dashboard. User and password belong into the machines' own.
environment=$(python3 -c 'import json, os
print(json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"], "TQDM_MININTERVAL": "30"}}))')

exec ray job submit \
    --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" \
    --working-dir "$folder" \
    --runtime-env-json "$environment" \
    -- osml tune --address auto "$@"
