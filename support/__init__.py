"""Modules that the commands share. Nobody has to open them to understand DDPM.

command, errors             flags from a dataclass, and every expected error as one line
files, progress             complete files, and the lines that a command prints
devices, workers            where the computation runs, and the processes of a torchrun
data, recipes, batches      images, the settings that suit them, and the random numbers of each step
budget                      time and memory of a training step, from a trial
checkpoint                  the file that a run writes
monitor                     training reports, the log file and stop signals
sampling, pictures          images from a network, and image files
plots, network_picture      charts, rows of images, and a drawing of the UNet
diffusers_format            weights in the layouts of other projects
"""
