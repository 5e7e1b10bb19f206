// One screen: does this device compute what was computed when the folder was made, how fast, and what is on a picture?

package ecqx.sample

import android.app.Activity
import android.content.Intent
import android.graphics.Bitmap
import android.graphics.BitmapFactory
import android.graphics.Canvas
import android.graphics.Color
import android.net.Uri
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import ecqx.EcqxModel
import java.util.concurrent.Executors

class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor() // the model is used by one thread
    private lateinit var words: TextView
    private lateinit var choose: Button
    private var model: EcqxModel? = null

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        words = TextView(this).apply {
            textSize = 16f
            text = "loading …"
        }
        choose = Button(this).apply {
            setText(R.string.choose)
            visibility = View.GONE
            setOnClickListener { askForPicture() }
        }
        val column = LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            fitsSystemWindows = true
            setPadding(48, 48, 48, 48)
            addView(choose)
            addView(words)
        }
        setContentView(ScrollView(this).apply { addView(column) })
        inBackground { check() }
    }

    override fun onDestroy() {
        worker.execute { model?.close() }
        worker.shutdown()
        super.onDestroy()
    }

    private fun check(): String {
        val found = EcqxModel { name -> assets.open("model/$name").use { it.readBytes() } }
        model = found
        val takesPictures = assets.open("model/golden.txt").bufferedReader().useLines { lines -> lines.any { it == "kind\timage" } }
        runOnUiThread { choose.visibility = if (takesPictures) View.VISIBLE else View.GONE }
        val lines = found.selfCheck().map { "${if (it.ok) "✓" else "✗"} ${it.name}: ${it.sentence}" }
        val figures = "%,d bytes, load %.1f ms, latency %.2f ms".format(found.bytes, found.loadMilliseconds, found.latencyMilliseconds())
        return (lines + figures).joinToString("\n\n")
    }

    private fun askForPicture() {
        val wanted = Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("image/*")
        startActivityForResult(wanted, PICTURE)
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        super.onActivityResult(request, result, data)
        val picture = data?.data ?: return
        if (request == PICTURE && result == RESULT_OK) inBackground { predict(picture) }
    }

    private fun predict(picture: Uri): String {
        val bitmap = contentResolver.openInputStream(picture)?.use { BitmapFactory.decodeStream(it) }
            ?: throw IllegalArgumentException("this picture cannot be read")
        // Transparent places are white, as everywhere else.
        val flat = Bitmap.createBitmap(bitmap.width, bitmap.height, Bitmap.Config.ARGB_8888)
        Canvas(flat).apply { drawColor(Color.WHITE) }.drawBitmap(bitmap, 0f, 0f, null)
        val pixels = IntArray(flat.width * flat.height)
        flat.getPixels(pixels, 0, flat.width, 0, 0, flat.width, flat.height)
        val known = model ?: throw IllegalStateException("the model is not loaded")
        val best = known.predict(known.imageToRaw(pixels, flat.width, flat.height)).take(5)
        return best.joinToString("\n") { "%s  %.1f %%".format(it.label, 100 * it.probability) }
    }

    private fun inBackground(work: () -> String) = worker.execute {
        val said = try {
            work()
        } catch (error: Exception) {
            "✗ ${error.message ?: error}"
        }
        runOnUiThread { words.text = said }
    }

    private companion object {
        const val PICTURE = 1
    }
}
