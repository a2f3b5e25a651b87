#!/usr/bin/env bash
# Runs mlx-ring-server from its folder: makes the Python environment, then hands over to api/cli. For bash 3.2 and later.
set -e

usage() {
  cat <<'TEXT'
usage: ./launch.sh COMMAND

  start      make the environment, fetch the model, start the server, wait until it is ready
  stop       end the server and everything it started, here and on the worker hosts
  restart    apply what changed in .env; requests go on where only the ring changes, and end first where not
  status     ranks, layers, memory, KV cache, requests
  logs       follow server.log (-n LINES: how many to begin with)
  plan       what would run where and whether it fits, without loading a model
  workers    bring code, environment and model to the WORKER_HOSTS and check them
  test       install what the tests need and run them (arguments go to pytest)
TEXT
}

# The folder this script lies in, also when it is called through a link.
script=$0
while [ -L "$script" ]; do
  target=$(readlink "$script")
  case $target in
  /*) script=$target ;;
  *) script=$(dirname "$script")/$target ;;
  esac
done
root=$(cd "$(dirname "$script")" && pwd -P)
cd "$root"
. "$root/distributed/environment.sh"
unset PYTHONPATH PYTHONHOME
python=$root/.venv/bin/python

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
start | restart | plan | workers)
  make_environment "$root" "$root/requirements.lock"
  exec "$python" -m api.cli "$command" "$@"
  ;;
stop | status | logs)
  if ! [ -x "$python" ]; then
    echo "not running: there is no environment yet (./launch.sh start makes it)"
    exit 0
  fi
  exec "$python" -m api.cli "$command" "$@"
  ;;
test)
  make_environment "$root" "$root/requirements.lock" "$root/requirements-dev.lock"
  exec "$python" -m pytest "$@"
  ;;
help | -h | --help)
  usage
  ;;
*)
  echo "launch.sh: there is no command '$command'" >&2
  usage >&2
  exit 2
  ;;
esac
