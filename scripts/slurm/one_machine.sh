#!/usr/bin/env bash
# A SLURM of one node on this machine, for trying things out and for `make test-slurm`: no systemd, no accounting.
#
#   scripts/slurm/one_machine.sh start FOLDER    installs it where apt-get can (Debian, Ubuntu; as root), starts it
#   scripts/slurm/one_machine.sh stop FOLDER     stops it again
#
# Then: export SLURM_CONF=FOLDER/slurm.conf, and sbatch, srun, squeue, scontrol work. Everything it writes is in FOLDER.
set -euo pipefail

die() {
  echo "one_machine.sh: $*" >&2
  exit 1
}

[ $# -eq 2 ] || die "expected: start FOLDER, or stop FOLDER"
mkdir -p "$2"
folder=$(cd "$2" && pwd)
case "$folder" in *[[:space:]]*) die "SLURM takes no folder with a space in its name: $folder" ;; esac

stop() {
  for daemon in slurmd slurmctld munged; do
    local file="$folder/$daemon.pid" pid
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    # A pid file may have outlived its process.
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$daemon" ]; then
      kill "$pid" 2>/dev/null || true
      for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
      done
      kill -9 "$pid" 2>/dev/null || true
    fi
    rm -f "$file"
  done
}

install() {
  [ "$(id -u)" = 0 ] || die "munge and slurm-wlm are to be installed and started by root"
  if ! command -v slurmctld slurmd munged >/dev/null; then
    command -v apt-get >/dev/null || die "no SLURM here, and no apt-get to install slurm-wlm and munge with"
    export DEBIAN_FRONTEND=noninteractive
    # Without systemd the packages cannot start anything, and need not.
    apt-get install -qq -y --no-install-recommends slurm-wlm munge >"$folder/apt.log" 2>&1 ||
      { apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge; } >>"$folder/apt.log" 2>&1 ||
      die "apt-get could not install slurm-wlm and munge: $(tail -n 3 "$folder/apt.log" | tr '\n' ' ')"
  fi
}

start() {
  install
  stop
  # munge insists on folders that nobody else may write to, from / down: not always true of FOLDER.
  mkdir -p /run/munge /var/lib/munge /var/log/munge
  chown munge: /run/munge /var/lib/munge /var/log/munge
  chmod 755 /run/munge
  [ -s /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=128 status=none; }
  chown munge: /etc/munge /etc/munge/munge.key
  chmod 600 /etc/munge/munge.key
  if ! munge -n </dev/null >/dev/null 2>&1; then
    setpriv --reuid munge --regid munge --init-groups munged --force --pid-file /run/munge/munged.pid
    cp /run/munge/munged.pid "$folder/munged.pid"
  fi

  local host cores memory
  host=$(hostname -s) cores=$(($(nproc) > 2 ? $(nproc) : 2)) memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
  rm -rf "$folder/state" "$folder/spool"
  mkdir -p "$folder/state" "$folder/spool"
  cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
ReturnToService=2
KillWait=10
# A test has jobs of two tasks, whatever the machine has.
SlurmdParameters=config_overrides
MinJobAge=3600
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF="$folder/slurm.conf"
  slurmctld || die "slurmctld does not start: $(tail -n 3 "$folder/slurmctld.log" 2>/dev/null | tr '\n' ' ')"
  slurmd || die "slurmd does not start: $(tail -n 3 "$folder/slurmd.log" 2>/dev/null | tr '\n' ' ')"
  for _ in $(seq 60); do
    [ "$(sinfo --noheader --format %T 2>/dev/null)" = idle ] && return
    sleep 0.5
  done
  die "the node does not come up: $(sinfo 2>&1 | tail -n 1); see $folder/slurmctld.log and $folder/slurmd.log"
}

case "$1" in
  start) start && echo "export SLURM_CONF=$folder/slurm.conf" ;;
  stop) stop ;;
  *) die "expected: start FOLDER, or stop FOLDER" ;;
esac
