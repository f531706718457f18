"""What the commands share. Each file has one duty; nobody has to open them to understand DDPM.

start                       loads torch, or says why it cannot be loaded
command, errors             flags from a dataclass, and every expected error as one line
files, progress             files that are whole or not there, and the line that shows how far it is
devices, workers            where the computation runs, and the processes that share it
data, recipes, batches      images, the settings that suit them, and the batch of each step
budget                      what a step costs here, from a trial, and what follows from that
checkpoint, outputs         what a run keeps, and its place beside what other runs have kept
monitor, snapshots          what a run reports: losses, and grids of samples
sampling, pictures          images from a network, and their files
diffusers_format            networks as others publish them, and weight_files, the files of their weights
"""
