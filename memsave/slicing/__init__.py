"""Running a module's forward part by part: the graph, the rules of its ops, the schedules and the planner."""
