"""From records of measurements to what a person or a pipeline decides by: pure functions of records."""
