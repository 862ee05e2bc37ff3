"""The words everyone speaks: instructions, signals, structures, records, errors and every socket. numpy only."""
