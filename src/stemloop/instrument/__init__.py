"""Who may use the microscope, how it is asked, how it answers."""
