#!/bin/sh
# Asks each node on which a job failed whether it sees the shared folders and can write to them.
#   why.sh SNAKEMAKE_LOG FOLDER...
# A node without the folder cannot even write the job's log: Slurm then says FAILED, and nothing else.
log=$1
shift
jobs=$(grep -oE "SLURM-job '[0-9]+' failed" "$log" | grep -oE '[0-9]+' | sort -u)
nodes=$(for job in $jobs; do scontrol -o show job "$job" | grep -oE 'BatchHost=[^ ]+' | cut -d= -f2; done | sort -u)
for node in $nodes; do
  for folder in "$@"; do
    # shellcheck disable=SC2016 # for the node's shell
    found=$(srun --quiet --immediate=30 --nodes=1 --ntasks=1 --nodelist="$node" --chdir=/ sh -c '
      [ -d "$0" ] || { echo "is not there: mount the shared folder"; exit; }
      probe=$0/.probe-$(hostname)-$$
      if head -c 65536 /dev/zero 2>/dev/null >"$probe"; then echo "can be written"
      else echo "cannot be written: it is full, read-only or not yours"; fi
      rm -f "$probe"' "$folder" 2>&1) || found="could not be looked at: $found"
    echo "$node: $folder $found"
  done
done
