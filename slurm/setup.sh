# What a job needs before python: sourced by every script here. Edit it, or name a file of your own in MODEL_SOUPS_SETUP.
#   module load cuda                                       # an example of modules
#   export PYTHON="apptainer exec --nv soups.sif python"   # an example of a container; it needs scontrol to requeue itself
if [ -f .venv/bin/activate ]; then
  source .venv/bin/activate
fi
