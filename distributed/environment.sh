# The Python environment of a machine, in POSIX sh: finds a Python, makes .venv from the lock files, and never takes an
# interrupted install for a finished one. Sourced by launch.sh and .ci/run here, and sent over ssh to the worker hosts
# (distributed/workers.py), so every machine of a ring gets its environment in the same way. Sourcing it does nothing.

# Says on stdout which Python to use; 1 where there is none that fits and can make environments, and no uv to bring one.
# Above the upper bound, packages of requirements.lock have no wheels.
find_python() {
  # ssh runs commands with a short PATH that lacks Homebrew and the home folder's programs.
  PATH=$PATH:/opt/homebrew/bin:/usr/local/bin:$HOME/.local/bin:$HOME/.cargo/bin
  for candidate in ${PYTHON:-} python3 python3.12 python3.13 python3.14 python3.11; do
    path=$(command -v "$candidate") || continue
    "$path" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1 || continue
    "$path" -c 'import sys; print(sys.executable)'
    return 0
  done
  command -v uv >/dev/null || return 1
  uv python find --system 3.12 2>/dev/null || { uv python install --quiet 3.12 >&2 && uv python find --system 3.12; }
}

explain_no_python() {
  {
    echo "Python 3.11 to 3.14 with its venv module is needed, and there is none (nor uv)."
    if command -v python3 >/dev/null; then echo "  found: $(command -v python3), $(python3 --version 2>&1)"; fi
    case $(uname -s) in
    Darwin) echo "  brew install python@3.12      or the installer from https://www.python.org/downloads/" ;;
    *) echo "  Debian, Ubuntu:  sudo apt install python3 python3-venv      Fedora:  sudo dnf install python3" ;;
    esac
    echo "  or uv, which brings its own Python:  curl -LsSf https://astral.sh/uv/install.sh | sh"
  } >&2
}

# make_environment ROOT LOCK...: ROOT/.venv holds every LOCK (paths) exactly; says nothing when it does already.
# The body is a subshell, so that its variables are not the caller's.
make_environment() (
  environment_root=$1
  shift
  venv=$environment_root/.venv
  is_complete "$@" && exit 0
  take_install_lock "$environment_root/.run" || exit 1
  status=0
  is_complete "$@" || install_locks "$@" || status=$?
  rm -rf "$environment_root/.run/installing"
  exit $status
)

# A lock file is installed when its copy lies in the environment: the copy is written last.
is_complete() {
  [ ! -e "$venv/.installing" ] || return 1
  for lock in "$@"; do cmp -s "$lock" "$venv/.installed-${lock##*/}" || return 1; done
  "$venv/bin/python" -c '' 2>/dev/null # fails when the Python it was made from is gone
}

install_locks() {
  if [ -e "$venv/.installing" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    rm -rf "$venv" # interrupted, or made from a Python that is gone
    mkdir -p "$venv" && : >"$venv/.installing" || return 1
    python=$(find_python) || {
      rm -rf "$venv"
      explain_no_python
      return 1
    }
    echo "making $venv with $python"
    "$python" -m venv "$venv" || return 1
  fi
  : >"$venv/.installing"
  if [ -t 1 ]; then quiet=; else quiet=--quiet; fi
  for lock in "$@"; do
    cmp -s "$lock" "$venv/.installed-${lock##*/}" && continue
    echo "installing $(grep -c == "$lock") pinned packages of ${lock##*/} (a few minutes the first time)"
    "$venv/bin/python" -m pip install $quiet --disable-pip-version-check --no-input -r "$lock" </dev/null || return 1
    cp "$lock" "$venv/.installed-${lock##*/}" || return 1
  done
  rm -f "$venv/.installing"
}

# Two installs at once would ruin each other. The lock of a process that is gone is taken over.
take_install_lock() {
  mkdir -p "$1" || return 1
  waited=0
  until mkdir "$1/installing" 2>/dev/null; do
    owner=$(cat "$1/installing/pid" 2>/dev/null || :)
    if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null; then
      rm -rf "$1/installing"
      continue
    fi
    [ $waited -gt 0 ] || echo "waiting for the install that process ${owner:-?} is doing"
    waited=$((waited + 1))
    if [ $waited -gt 900 ]; then
      echo "still locked after 15 minutes: remove $1/installing if no install is running" >&2
      return 1
    fi
    sleep 1
  done
  echo $$ >"$1/installing/pid"
}
