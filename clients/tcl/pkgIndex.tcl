if {![package vsatisfies [package provide Tcl] 8.6-]} {return}
package ifneeded compute_broker 0.1.0 [list source [file join $dir compute_broker.tcl]]
