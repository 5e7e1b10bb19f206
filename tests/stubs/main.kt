// FOLDER [JOB | WIDTH HEIGHT RGBA_FILE]: the self-check, exit status 1 if it fails; or a job; or the raw sample of a picture, in hexadecimal.
import ecqx.EcqxJob
import ecqx.EcqxModel
import java.io.File
import kotlin.system.exitProcess

fun main(arguments: Array<String>) {
    val model = EcqxModel { File(arguments[0], it).readBytes() }
    if (arguments.size == 2) {
        EcqxJob(model, File(arguments[1]), "a \"stand-in\" on the JVM").run { println(it) }
        return
    }
    if (arguments.size > 2) {
        val rgba = File(arguments[3]).readBytes()
        fun at(i: Int) = rgba[i].toInt() and 255
        val pixels = IntArray(rgba.size / 4) { (255 shl 24) or (at(4 * it) shl 16) or (at(4 * it + 1) shl 8) or at(4 * it + 2) }
        val raw = model.imageToRaw(pixels, arguments[1].toInt(), arguments[2].toInt())
        println((0 until raw.count).joinToString("") { "%02x".format(raw[it].toInt()) })
        return
    }
    val checks = model.selfCheck()
    for (check in checks) println("${check.name}: ${check.ok} ${check.sentence}")
    println("${model.latencyMilliseconds(3)} ms")
    exitProcess(if (checks.all { it.ok }) 0 else 1)
}
