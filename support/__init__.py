"""What the commands share. Each file has one duty; nobody has to open them to understand DDPM.

    command, errors             flags from a dataclass, and every expected error as one line
    files, progress             files that are whole or not there, and the line that shows how far it is
    devices, workers            where the computation runs, and the processes that share it
    data, recipes, batches      images, the settings that suit them, and the batch of each step
    checkpoint, monitor         what a run keeps, and what it reports
    sampling, pictures          images from a network, and their files
"""
