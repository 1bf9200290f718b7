"""What `python -m soups.export` is now."""

from soups.errors import refuse

refuse(
    "python -m soups.export is now `soups export SOUP --to LIBRARY --out DIR` for soups of your files, and "
    "`python -m soups.experiment.export soup=runs/NAME/soups/RECIPE to=LIBRARY out=DIR` for those of a sweep"
)
