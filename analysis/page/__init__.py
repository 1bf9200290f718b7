"""The report of an experiment as one page of HTML, made from the files of its run folder."""
